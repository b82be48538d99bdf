"""The int16 baseline: python -m qflow.tune +experiment=int16

All operators run at int16, which is the upper bound of the accuracy of int8/int16 with int8 weights. If it misses the
goal under every searched calibration method, the decision names the operators that cause this, by the sensitivities of
all-int16, and int16 weights are tried where a weight is the cause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qflow.core.dtype import QDtype
from qflow.search.objective import CONSTRAINT, accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ASSIGNMENT
from qflow.study.baselines import ALL_INT16, baseline, baseline_point, method_of, retry_calibration
from qflow.study.causes import int16_miss_reason
from qflow.study.fewer import without_needless
from qflow.study.int16_weights import raise_weights, weights_that_matter
from qflow.study.mixes import own_ranking
from qflow.study.session import Session
from qflow.study.stages import rank_again
from qflow.study.start_trial import measure_start


def run(session: Session) -> None:
    """Measure in this order."""
    int16 = branch(session)
    measure_start(session)
    if not accurate(int16):
        with_weights(session, int16)


def branch(session: Session) -> FinishedTrial | None:
    """Measure all-int16 and record what follows from it; None if its outputs are not finite."""
    int16, goal = baseline(session, ALL_INT16), session.goal.max_drop
    if accurate(int16):
        drop, method = int16.outcome.metrics["accuracy/drop"], method_of(session, int16.params)
        session.decide(
            ALL_INT16,
            f"drop {drop:+.4f} under {method} meets {goal:g}: int8 comes next (+experiment=int8, int8_int16)",
        )
    else:
        miss = (
            f"misses the goal by {int16.outcome.constraints[CONSTRAINT]:.4f}" if int16 else "its outputs are not finite"
        )
        weights = weights_that_matter(session, _point(session, int16), QDtype.qint16)
        following = "int16 weights are next" if weights else "int16/fp16 is next (+experiment=int16_fp16)"
        session.decide(ALL_INT16, f"{miss}: {_reason(session, int16)}; {following}")
    return int16


def _reason(session: Session, int16: FinishedTrial | None) -> str:
    """Rank all-int16 on its own bad cases, and return why it misses the goal."""
    evaluator, point = session.evaluator, _point(session, int16)
    at8 = evaluator.sensitivities or evaluator.rank()
    with own_ranking(session):
        table = rank_again(session, ALL_INT16, point)
        return int16_miss_reason(evaluator, table, evaluator.resolve(session.qconfig_at(point))[1], at8)


def _point(session: Session, int16: FinishedTrial | None) -> Mapping[str, Any]:
    return int16.params if int16 else baseline_point(session, ALL_INT16)


def with_weights(session: Session, int16: FinishedTrial | None) -> FinishedTrial | None:
    """Return the trial with the fewest int16 weights, and all else at int16 that may be, that meets the goal.

    Where the device does not multiply int16 by int16, the inputs of these weights are int8. If no number of them meets
    the goal, the most accurate trial comes back, which may be all-int16 itself (`int16`): fp16 goes on top of it.
    """
    point = _point(session, int16)
    order = weights_that_matter(session, point, QDtype.qint16)
    if not order:
        return int16
    started = len(session.measured)
    found = raise_weights(session, point, QDtype.qint16) or retry_calibration(session, session.measured[started:])
    if found is None:
        tried = session.measured[started:]
        counts = f"up to {len(order)} int16 weights" if len(order) > 1 else "1 int16 weight"
        least = f", drop {min(map(_drop, tried)):+.4f}" if tried else ""
        session.decide(
            "int16 weights", f"the goal is missed with {counts}{least}; int16/fp16 is next (+experiment=int16_fp16)"
        )
        return min([*([int16] if int16 else []), *tried], key=_drop, default=None)
    found, chosen = _needed_weights(session, found, order)
    session.baselines["int16-weights"] = found
    session.decide(
        "int16 weights",
        f"int16 for {len(chosen)} of {len(order)} weights that gain from it reduces the drop of all-int16 to "
        f"{found.outcome.metrics['accuracy/drop']:+.4f}: {', '.join(chosen)}; no operator needs fp16",
    )
    return found


def _drop(trial: FinishedTrial) -> float:
    return trial.outcome.metrics["accuracy/drop"]


def _needed_weights(
    session: Session, found: FinishedTrial, order: Sequence[str]
) -> tuple[FinishedTrial, tuple[str, ...]]:
    """Return the trial with the fewest int16 weights of `found` that meets the goal, and these weights."""
    precisions = session.evaluator.precisions

    def at(names: Sequence[str]) -> dict[str, Any]:
        mix = precisions.weight_mix(session.qconfig_at(found.params), QDtype.qint16, names)
        return {**found.params, ASSIGNMENT: mix}

    def weights(trial: FinishedTrial) -> tuple[str, ...]:
        raised = precisions.resolve(session.qconfig_at(trial.params))[1].weights(QDtype.qint16)
        return tuple(name for name in order if name in raised)

    fewest = without_needless(session, found, weights(found), at, "int16, int16 weights")
    return fewest, weights(fewest)
