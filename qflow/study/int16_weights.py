"""int16 weights in a study: when they are searched, and the fewest with which a baseline meets the goal.

`qconfig.sensitive_type=both` makes weights part of the choice, in every strategy. A study that leaves it at its default
uses it where int16 gains much on a weight (Precisions.weight_order).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from qflow.core.dtype import QDtype
from qflow.search.objective import nearest_miss
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ASSIGNMENT, RATIO, SENSITIVE_TYPE, raise_until_met
from qflow.study.baselines import retry_calibration
from qflow.study.session import Session

COUNT = "int16 weights"


def weights_searched(session: Session, high: FinishedTrial) -> dict[str, Any]:
    """Return the values that make weights part of the search; none if they are not, or the sampler decides it.

    They are part of it if the configuration says so, if `high`, the trial that meets the goal, needs them, or if the
    gain of one is large among the sensitivities at int8.
    """
    settings, needed = session.qconfig_at(session.base()), high.params.get(SENSITIVE_TYPE) == "both"
    if not needed and (SENSITIVE_TYPE in session.study.space or settings.counting != "operators"):
        return {}
    if not needed and settings.sensitive_type != "activation":
        return {SENSITIVE_TYPE: settings.sensitive_type}
    order = session.evaluator.precisions.weight_order(settings, QDtype.qint8)
    if not needed and not order:
        return {}
    why = f"{order[0]} gains most from it" if order else "the goal needs them"
    session.console.say(f"{'weights':<12} int16 weights are searched too: {why} (qconfig.sensitive_type=both)")
    return {SENSITIVE_TYPE: "both", **({} if settings.counting == "operators" else {"qconfig.counting": "operators"})}


def weights_that_matter(session: Session, point: Mapping[str, Any], rest: QDtype) -> tuple[str, ...]:
    """Return the operators whose weight may be why the baseline at `point`, with outputs at `rest`, misses the goal."""
    return session.evaluator.precisions.weight_order(session.qconfig_at(point), rest)


def raise_weights(session: Session, point: Mapping[str, Any], rest: QDtype) -> FinishedTrial | None:
    """Find the fewest int16 weights with which the baseline at `point` meets the goal; None if no number of them does.

    The weights are promoted in the order of their gain. Their inputs become int8 where the device requires it; all
    other outputs stay at `rest`. Each drop is measured in full, because fp16 may go on top of the smallest.
    """
    precisions, order = session.evaluator.precisions, weights_that_matter(session, point, rest)
    base = {**point, RATIO: 0.0, SENSITIVE_TYPE: "both"}
    settings = session.qconfig_at(base)

    def measure(counts: Mapping[str, Any], label: str) -> FinishedTrial | None:
        mix = precisions.weight_mix(settings, rest, order[: counts[COUNT]])
        return session.measure({**base, ASSIGNMENT: mix}, f"{rest.value[1:]}, {label}")

    return raise_until_met(measure, {}, COUNT, range(len(order) + 1), patience=0)


def weights_beside(session: Session, missed: Sequence[FinishedTrial], raised: Collection[str]) -> dict[str, Any] | None:
    """Return the point of the int16 weights with which the nearest of `missed` meets the goal, or None.

    `missed` are trials with fp16 operators, whose settings `raised` are left out of the point.
    """
    nearest = nearest_miss(missed, session.goal.ranking)
    if nearest is None or not weights_that_matter(session, nearest.params, QDtype.qint16):
        return None
    started = len(session.measured)
    found = raise_weights(session, nearest.params, QDtype.qint16)
    found = found or retry_calibration(session, session.measured[started:])
    return {key: value for key, value in found.params.items() if key not in raised} if found else None
