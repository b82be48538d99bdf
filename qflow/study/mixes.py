"""The search of a mix: of int16 operators by the chosen strategy, and of fp16 operators in all-int16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from qflow.config.settings import plain
from qflow.core.dtype import QDtype
from qflow.core.op_spec import parse_op
from qflow.core.setter import covers
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ASSIGNMENT, FLOAT16, RATIO, SENSITIVE_TYPE, BudgetSpent, assign, raise_until_met
from qflow.study.baselines import ALL_INT8, ALL_INT16, baseline_point, calibrated_point, retry_calibrations
from qflow.study.int16_weights import raise_weights, weights_searched
from qflow.study.session import Session
from qflow.study.stages import rank_again

Baseline: TypeAlias = FinishedTrial | None
Strategy: TypeAlias = Callable[[Session, dict[str, Any], Baseline, FinishedTrial], None]
"""Takes the session, the point without int16 to start from, and the baselines at int8 and int16."""


def search_mix(session: Session, low: Baseline, high: FinishedTrial) -> None:
    """Search the int16 operators between two baselines by `search.strategy`, until it ends or the budget is spent.

    `low` is None if its outputs are not finite; `high` meets the goal.
    """
    strategies: Mapping[str, Strategy] = {
        "optuna": _by_sampler,
        "ratio": _by_ratio,
        "assign": _by_assignment,
    }
    weights = weights_searched(session, high)
    base = {**calibrated_point(low or baseline_point(session, ALL_INT8)), **weights, RATIO: 0.0}
    before, hits = len(session.trials), session.evaluator.hits
    with session.console.stage("search") as say:
        ended = "done"
        try:
            if weights.get(SENSITIVE_TYPE) == "both":
                raise_weights(session, base, QDtype.qint8)
            strategies[session.config.search.strategy](session, base, low, high)
            if session.best is None:
                retry_calibrations(session, session.trials[before:])
        except BudgetSpent as spent:
            ended = str(spent)
        searched = len(session.trials) - before
        known = session.evaluator.hits - hits
        parts = [f"{searched} trials by {session.config.search.strategy}", f"{known} already evaluated"]
        parts += [f"{session.screened} left out that cost too much to be the best"] if session.screened else []
        say(f"{', '.join(parts)}; {ended}")


def _by_sampler(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    """Measure the points of `search.enqueue`, completed by the values of all-int8, then those of the sampler."""
    for point in plain(session.config.search.enqueue):
        known = {k: v for k, v in point.items() if k in session.study.space and k not in session.kept}
        if known:  # skips a point that sets none of the searched keys
            session.measure({**base, **known}, " ".join(f"{k.split('.')[-1]}={v}" for k, v in known.items()))
    before = dict(session.kept)
    session.kept |= {key: value for key, value in base.items() if key == SENSITIVE_TYPE}
    try:
        while session.sample():
            pass
    finally:
        session.kept = before


def _by_ratio(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    ratios = session.evaluator.precisions.int16_ratios(session.qconfig_at(base), session.goal.budgets)
    with session.pass_or_fail():
        raise_until_met(session.measure, base, RATIO, ratios)


def _by_assignment(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    assign(
        session.measure,
        base,
        session.evaluator.precisions.problem(session.qconfig_at(base), session.goal.budgets),
        max_drop=session.goal.max_drop,
        int8_drop=low.outcome.metrics["accuracy/drop"] if low else None,
        int16_drop=high.outcome.metrics["accuracy/drop"],
        top=str(high.params.get(ASSIGNMENT, "")),
    )


@contextmanager
def own_ranking(session: Session) -> Iterator[None]:
    """Let a branch rank the operators of its own model; afterwards the ranking is as before."""
    evaluator = session.evaluator
    before = evaluator.badcases, evaluator.sensitivities
    try:
        yield
    finally:
        evaluator.badcases, evaluator.sensitivities = before


def raise_float16(session: Session, int16: Baseline) -> tuple[FinishedTrial | None, list[str]]:
    """Find the fewest fp16 operators with which all-int16 meets the goal, ranked by the errors of all-int16.

    Return the trial, or None if no number of them meets the goal, and the settings (`qconfig.modules.<name>`) of all
    operators that gain from fp16, in that order; those of the trial's point are in fp16.
    """
    base = {**calibrated_point(int16 or baseline_point(session, ALL_INT16)), RATIO: 1.0}
    with own_ranking(session):
        rank_again(session, ALL_INT16, base)
        order = [name for name in session.evaluator.precisions.float16_order if not _pinned(session, name)]
        settings = [f"qconfig.modules.{name}" for name in order]

        def measure(point: Mapping[str, Any], label: str) -> FinishedTrial | None:
            raised = dict.fromkeys(settings[: int(point[FLOAT16])], "float16")
            return session.measure({**base, **raised}, label)

        with session.console.stage("fp16") as say:
            with session.pass_or_fail():
                best = raise_until_met(measure, base, FLOAT16, list(range(len(order) + 1)), patience=0)
                best = best or retry_calibrations(session, [t for t in session.trials if t.params.keys() & {*settings}])
            chosen = [name for name, key in zip(order, settings, strict=True) if best and key in best.params]
            say(
                f"{len(chosen)} of {len(order)} operators that gain from fp16 suffice: {', '.join(chosen)}"
                if best
                else f"operators that gain from fp16: {len(order)}; no number of them meets the goal"
            )
    return best, settings


def _pinned(session: Session, operator: str) -> bool:
    """Return whether `qconfig.modules` decides the output of an operator."""
    modules = plain(session.config.qconfig.modules)
    return any("output" in parse_op(value, name) and covers(name, operator) for name, value in modules.items())
