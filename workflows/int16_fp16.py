"""The guide's int16/fp16 branch: python -m qflow.tune +experiment=int16_fp16

All int16 misses the goal: a few operators of the vector unit get fp16, those first whose error falls most by it.
"""

from __future__ import annotations

from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import FLOAT16
from qflow.study.session import Session
from qflow.study.stages import raise_float16

from . import int16


def run(session: Session) -> None:
    """What is measured, in order."""
    ceiling = int16.branch(session)
    if not accurate(ceiling):
        branch(session)


def branch(session: Session) -> FinishedTrial | None:
    """The fewest fp16 operators that lift the ceiling over the goal, or None."""
    found = raise_float16(session)
    order = session.evaluator.precisions.float16_order
    if found is None:
        gain = f"with fp16 on all {len(order)} that gain from it" if order else "no operator gains from fp16:"
        session.decide("int16/fp16", f"{gain} the goal stays missed: change the float model, or train (qat)")
        return None
    count = int(found.params[FLOAT16] or 0)
    session.decide(
        "int16/fp16",
        f"{count} operators in fp16 lift the ceiling to drop {found.outcome.metrics['accuracy/drop']:+.4f}: "
        f"{', '.join(order[:count])}; they are kept for int8/int16/fp16 (+experiment=int8_int16_fp16)",
    )
    return found
