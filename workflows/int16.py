"""The int16 baseline: python -m qflow.tune +experiment=int16

All operators run at int16, which is the upper bound of the accuracy of int8/int16. If it misses the goal under every
searched calibration method, the decision names the operators that cause this, by the sensitivities of all-int16.
"""

from __future__ import annotations

from qflow.search.objective import CONSTRAINT, accurate
from qflow.search.outcome import FinishedTrial
from qflow.study.baselines import ALL_INT16, baseline, baseline_point, method_of
from qflow.study.causes import int16_miss_reason
from qflow.study.mixes import own_ranking
from qflow.study.session import Session
from qflow.study.stages import rank_again


def run(session: Session) -> None:
    """Measure in this order."""
    branch(session)


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
        session.decide(ALL_INT16, f"{miss}: {_reason(session, int16)}; int16/fp16 is next (+experiment=int16_fp16)")
    return int16


def _reason(session: Session, int16: FinishedTrial | None) -> str:
    """Rank all-int16 on its own bad cases, and return why it misses the goal."""
    evaluator, point = session.evaluator, int16.params if int16 else baseline_point(session, ALL_INT16)
    at8 = evaluator.sensitivities or evaluator.rank()
    with own_ranking(session):
        table = rank_again(session, ALL_INT16, point)
        return int16_miss_reason(evaluator, table, evaluator.resolve(session.qconfig_at(point))[1], at8)
