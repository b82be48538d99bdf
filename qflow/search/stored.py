"""A study read back from what its runs store: the space and the trials, without Optuna's database."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qflow.search.domain import Choice, Condition, Domain, Interval, Range, Scalar, Space
from qflow.search.outcome import FinishedTrial, Marker


def space_from_dict(terms: Mapping[str, Any]) -> dict[str, Domain]:
    """Return the space that `space_dict` wrote."""
    return {key: _domain(node) for key, node in terms.items()}


def _domain(node: Mapping[str, Any]) -> Domain:
    when = tuple(Condition(c["key"], _domain(c["allowed"])) for c in node.get("when", ()))
    if node["kind"] == "choice":
        return Choice(tuple(node["values"]), when=when)
    if node["kind"] == "interval":
        return Interval(node["low"], node["high"], node["log"], node["integer"], when=when)
    return Range(node["start"], node["stop"], node["step"], when=when)


def stored_trials(
    runs: Sequence[tuple[str, int, str, str | None]], space: Space, named: Callable[[str], str]
) -> list[FinishedTrial]:
    """Return the committed trials of (run id, number, status, marker), by number.

    The point of a trial is read from its params: those of the searched keys, which `named` maps to the params' names.
    """
    found = {}
    for run_id, number, _, text in runs:
        if text:
            marker = Marker.from_json(text)
            params = marker.outcome.params
            point: dict[str, Scalar] = {key: params[named(key)] for key in space if named(key) in params}
            found[number] = FinishedTrial(number, run_id, point, marker.label, marker.outcome, marker.seconds)
    return [found[number] for number in sorted(found)]
