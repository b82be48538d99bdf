"""The ceiling: python -m qflow.tune +experiment=int16

All operators at int16: the upper bound of int8/int16 accuracy. Where it misses the goal, which operators it misses by.
"""

from __future__ import annotations

from qflow.search.objective import CONSTRAINT, accurate
from qflow.search.outcome import FinishedTrial
from qflow.study.session import Session
from qflow.study.stages import ALL_INT16, baseline, ceiling_reason


def run(session: Session) -> None:
    """What is measured, in order."""
    branch(session)


def branch(session: Session) -> FinishedTrial:
    """Measure the ceiling and say what follows from it."""
    ceiling = baseline(session, ALL_INT16)
    drop, goal = ceiling.outcome.metrics["accuracy/drop"], session.goal.max_drop
    if accurate(ceiling):
        session.decide(ALL_INT16, f"drop {drop:+.4f} meets {goal:g}: int8 comes next (+experiment=int8, int8_int16)")
    else:
        reason = ceiling_reason(session.evaluator)
        miss = ceiling.outcome.constraints[CONSTRAINT]
        session.decide(
            ALL_INT16, f"misses the goal by {miss:.4f}: {reason}; int16/fp16 is next (+experiment=int16_fp16)"
        )
    return ceiling
