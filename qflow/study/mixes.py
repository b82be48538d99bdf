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
from qflow.study.at_once import at_once
from qflow.study.baselines import (
    ALL_INT8,
    ALL_INT16,
    METHOD,
    baseline_point,
    free_point,
    method_of,
    retry_calibration,
)
from qflow.study.budget import evaluations, halted
from qflow.study.fewer import lower_best, without_needless
from qflow.study.int16_weights import raise_weights, weights_searched
from qflow.study.missed import ATTEMPTS, measure_promising
from qflow.study.mix_inside import MixInside, mix_problem
from qflow.study.session import Session
from qflow.study.stages import rank_again

SPARE = 6  # trials that exploration leaves to lower what it finds
Baseline: TypeAlias = FinishedTrial | None
Strategy: TypeAlias = Callable[[Session, dict[str, Any], Baseline, FinishedTrial], None]
"""Takes the session, the point without int16 to start from, and the baselines at int8 and int16."""


def search_mix(session: Session, low: Baseline, high: FinishedTrial) -> None:
    """Search the int16 operators between two baselines by `search.strategy`, until it ends or the budget is spent.

    `low` is None if its outputs are not finite; `high` meets the goal. What is predicted to meet it, and the nearest
    miss under another calibration, come before the exploration that takes the rest of the budget.
    """
    chosen, weights = session.config.search.strategy, weights_searched(session, high)
    before = len(session.trials)
    with session.console.stage("search") as say:
        ended = ""
        try:
            low = _calibrated_as(session, low, high)
            # once nothing may be measured, a strategy would only repeat what the study knows
            session.budget.require(session.trials, session.untrained_best is not None)
            own = low.params if low else {**baseline_point(session, ALL_INT8), METHOD: method_of(session, high.params)}
            base = {**free_point(own), **weights, RATIO: 0.0}
            started = len(session.measured)
            if weights.get(SENSITIVE_TYPE) == "both":
                raise_weights(session, base, QDtype.qint8)
            FINDING[chosen](session, base, low, high)
            if session.untrained_best is None:
                retry_calibration(session, session.measured[started:])
                measure_promising(session)
            if chosen in EXPLORING:
                with _spared(session):
                    EXPLORING[chosen](session, base, low, high)
            lower_best(session)
            if chosen in EXPLORING:  # with what that has left of the budget
                EXPLORING[chosen](session, base, low, high)
        except BudgetSpent as spent:
            ended = str(spent)
            lower_best(session)
        trials = session.trials[before:]
        searched, known = len(trials), len(trials) - evaluations(trials)
        parts = [f"{searched} trials by {chosen}", f"{known} already evaluated"]
        parts += [f"{session.screened} left out that cost too much to be the best"] if session.screened else []
        say(f"{', '.join(parts)}; {ended or halted(session.driver) or 'done'}")


@contextmanager
def _spared(session: Session) -> Iterator[None]:
    """Leave a part of the budget for lowering the best mix; reaching that part ends the block."""
    session.budget.spare = SPARE
    try:
        yield
    except BudgetSpent:
        session.budget.spare = 0
        session.budget.require(session.trials, session.untrained_best is not None)  # raises if nothing is left at all
    finally:
        session.budget.spare = 0


def _calibrated_as(session: Session, low: Baseline, high: FinishedTrial) -> Baseline:
    """Return all-int8 under the calibration method of `high`, which is known to meet the goal at the other end."""
    method = method_of(session, high.params)
    if low is None or method_of(session, low.params) == method:
        return low
    return session.measure({**low.params, METHOD: method}, f"all-int8 {method}")


def _by_sampler(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    """Measure the points of `search.enqueue`, completed by the values of all-int8, then those of the sampler.

    Ends with the first trial that meets the goal; a few are left for what is measured before it is called missed.
    """
    _enqueued(session, base)
    most = session.config.search.n_trials
    left = min(ATTEMPTS + 1, most // 4)
    _sampled(session, base, lambda: session.untrained_best is None and most - session.begun > left)


def _enqueued(session: Session, base: dict[str, Any]) -> None:
    """Measure the points of `search.enqueue`, completed by the values of `base`."""
    for point in plain(session.config.search.enqueue):
        known = {k: v for k, v in point.items() if k in session.study.space and k not in session.kept}
        if known:  # skips a point that sets none of the searched keys
            session.measure({**base, **known}, " ".join(f"{k.split('.')[-1]}={v}" for k, v in known.items()))


def _sampled(session: Session, base: dict[str, Any], more: Callable[[], bool] = lambda: True) -> None:
    """Measure the sampler's points while `more` holds, with int16 weights if `base` searches them."""
    before = dict(session.kept)
    session.kept |= {key: value for key, value in base.items() if key == SENSITIVE_TYPE}
    try:
        while session.sample(more=more):
            pass
    finally:
        session.kept = before


def _by_ratio(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    ratios = session.evaluator.precisions.int16_ratios(session.qconfig_at(base), session.goal.budgets)
    with session.pass_or_fail():
        raise_until_met(session.measure, base, RATIO, ratios, at_once=at_once(session))


def _by_assignment(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    """Measure the points of `search.enqueue`, then the mixes that `assign` finds under the baselines' settings."""
    _enqueued(session, base)
    problem = mix_problem(session, session.qconfig_at(base))
    assign(
        session.measure,
        base,
        problem,
        max_drop=session.goal.max_drop,
        int8_drop=low.outcome.metrics["accuracy/drop"] if low else None,
        int16_drop=high.outcome.metrics["accuracy/drop"],
        top=problem.plain(str(high.params.get(ASSIGNMENT, ""))),
        explore=False,
        at_once=at_once(session),
    )


def _settings_around(session: Session, base: dict[str, Any], low: Baseline, high: FinishedTrial) -> None:
    """Measure the settings that the sampler proposes, each with the mix that is most worth a trial under them."""
    inside = MixInside(session, base, low, high)
    while session.sample(inside):
        pass


FINDING: Mapping[str, Strategy] = {"optuna": _by_sampler, "ratio": _by_ratio, "assign": _by_assignment}
"""Strategy -> what finds a mix that meets the goal."""
EXPLORING: Mapping[str, Strategy] = {
    "optuna": lambda session, base, low, high: _sampled(session, base),
    "assign": _settings_around,
}
"""Strategy -> what spends the rest of the budget."""


@contextmanager
def own_ranking(session: Session) -> Iterator[None]:
    """Let a branch rank the operators of its own model; afterwards the ranking is as before."""
    evaluator = session.evaluator
    before = evaluator.badcases, evaluator.sensitivities
    try:
        yield
    finally:
        evaluator.badcases, evaluator.sensitivities = before


def raise_float16(
    session: Session, start: Mapping[str, Any] | None, title: str
) -> tuple[FinishedTrial | None, list[str]]:
    """Find the fewest fp16 operators with which the mix at `start` meets the goal, ranked by the errors of that mix.

    `start`, called `title`, is the point of all-int16 (None if its outputs are not finite), maybe with int16 weights.
    Return the trial, or None if no number of them meets the goal, and the settings (`qconfig.modules.<name>`) of all
    operators that gain from fp16, in that order; those that the trial's point sets to float16 are in fp16.
    """
    base = dict(start) if start is not None else baseline_point(session, ALL_INT16)
    with own_ranking(session):
        rank_again(session, title, base)
        order = [name for name in session.evaluator.precisions.float16_order if not _pinned(session, name)]
        settings = [f"qconfig.modules.{name}" for name in order]

        def measure(point: Mapping[str, Any], label: str) -> FinishedTrial | None:
            raised = dict.fromkeys(settings[: int(point[FLOAT16])], "float16")
            return session.measure({**base, **raised}, label)

        started = len(session.measured)
        with session.console.stage("fp16") as say:
            with session.pass_or_fail():
                best = raise_until_met(measure, base, FLOAT16, list(range(len(order) + 1)), patience=0)
                best = best or retry_calibration(session, session.measured[started:])
            if best is not None:
                rest = {k: v for k, v in best.params.items() if k not in settings}
                rest |= {k: v for k, v in base.items() if k in settings}
                keys = [key for key in settings if _raised(best, key)]
                best = without_needless(
                    session, best, keys, lambda some: {**rest, **dict.fromkeys(some, "float16")}, "float16_count"
                )
            chosen = [name for name, key in zip(order, settings, strict=True) if best and _raised(best, key)]
            say(
                f"{len(chosen)} of {len(order)} operators that gain from fp16 suffice: {', '.join(chosen)}"
                if best
                else f"operators that gain from fp16: {len(order)}; no number of them meets the goal"
            )
    return best, settings


def _raised(trial: FinishedTrial, key: str) -> bool:
    return trial.params.get(key) == "float16"


def _pinned(session: Session, operator: str) -> bool:
    """Return whether `qconfig.modules` decides the output of an operator."""
    modules = plain(session.config.qconfig.modules)
    return any("output" in parse_op(value, name) and covers(name, operator) for name, value in modules.items())
