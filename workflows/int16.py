"""The int16 baseline: python -m qflow.tune +experiment=int16

All operators run at int16, which is the upper bound of the accuracy of int8/int16. If it misses the goal, the decision
names the operators that cause this.
"""

from __future__ import annotations

from qflow.search.objective import CONSTRAINT, accurate
from qflow.search.outcome import FinishedTrial
from qflow.study.session import Session
from qflow.study.stages import ALL_INT16, baseline, int16_miss_reason


def run(session: Session) -> None:
    """Measure in this order."""
    branch(session)


def branch(session: Session) -> FinishedTrial:
    """Measure all-int16 and record what follows from it."""
    int16 = baseline(session, ALL_INT16)
    drop, goal = int16.outcome.metrics["accuracy/drop"], session.goal.max_drop
    if accurate(int16):
        session.decide(ALL_INT16, f"drop {drop:+.4f} meets {goal:g}: int8 comes next (+experiment=int8, int8_int16)")
    else:
        reason = int16_miss_reason(session.evaluator)
        miss = int16.outcome.constraints[CONSTRAINT]
        session.decide(
            ALL_INT16, f"misses the goal by {miss:.4f}: {reason}; int16/fp16 is next (+experiment=int16_fp16)"
        )
    return int16
