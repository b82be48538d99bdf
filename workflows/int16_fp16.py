"""The guide's int16/fp16 branch: python -m qflow.tune +experiment=int16_fp16

If all-int16 misses the goal, a few operators of the vector unit get fp16, in the order of how much it lowers their
error in all-int16.
"""

from __future__ import annotations

from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.study.mixes import raise_float16
from qflow.study.session import Session

from . import int16


def run(session: Session) -> None:
    """Measure in this order."""
    baseline = int16.branch(session)
    if not accurate(baseline):
        branch(session, baseline)


def branch(session: Session, int16_baseline: FinishedTrial | None) -> FinishedTrial | None:
    """Return the trial with the fewest fp16 operators in all-int16 that meets the goal, or None.

    All further trials keep these fp16 operators.
    """
    found, order = raise_float16(session, int16_baseline)
    if found is None:
        missed = f"the goal is missed even with fp16 on all {len(order)} operators that gain from it"
        reason = missed if order else "the goal is missed, and no operator gains from fp16"
        session.decide("int16/fp16", reason)
        return None
    chosen = {key: "float16" for key in order if found.params.get(key) == "float16"}
    session.kept |= chosen
    names, drop = [key.removeprefix("qconfig.modules.") for key in chosen], found.outcome.metrics["accuracy/drop"]
    several = "s" if len(names) > 1 else ""
    session.decide(
        "int16/fp16",
        f"{len(names)} operator{several} in fp16 reduce the drop of all-int16 to {drop:+.4f}: {', '.join(names)}; they "
        "are kept for int8/int16/fp16 (+experiment=int8_int16_fp16)",
    )
    return found
