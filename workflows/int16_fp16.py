"""The guide's int16/fp16 branch: python -m qflow.tune +experiment=int16_fp16

If all-int16 misses the goal, a few operators of the vector unit get fp16, in the order of how much it lowers their
error.
"""

from __future__ import annotations

from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import FLOAT16
from qflow.study.session import Session
from qflow.study.stages import raise_float16

from . import int16


def run(session: Session) -> None:
    """Measure in this order."""
    if not accurate(int16.branch(session)):
        branch(session)


def branch(session: Session) -> FinishedTrial | None:
    """Return the trial with the fewest fp16 operators in all-int16 that meets the goal, or None."""
    found = raise_float16(session)
    order = session.evaluator.precisions.float16_order
    if found is None:
        missed = f"the goal is missed even with fp16 on all {len(order)} operators that gain from it"
        reason = missed if order else "the goal is missed, and no operator gains from fp16"
        session.decide("int16/fp16", f"{reason}; change the float model, or train (qat)")
        return None
    count = int(found.params[FLOAT16] or 0)
    session.decide(
        "int16/fp16",
        f"{count} operators in fp16 reduce the drop of all-int16 to {found.outcome.metrics['accuracy/drop']:+.4f}: "
        f"{', '.join(order[:count])}; they are kept for int8/int16/fp16 (+experiment=int8_int16_fp16)",
    )
    return found
