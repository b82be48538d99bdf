"""The guide's int8/int16 branch: python -m qflow.tune +experiment=int8_int16

    float model -> trace, fuse, check -> calibrate -> bad cases -> layer by layer -> sensitivity -> advice
        -> all-int16 (ceiling) and all-int8 (floor)
        all-int16 misses the goal:   stop; int8/int16 cannot do better than its ceiling
        all-int8 meets the goal:     stop; nothing needs int16
        -> search calibration and int16 for the cheapest mix that meets the goal (search.strategy)
        -> train what misses, and give int16 back (qat.apply=after_search)

The guide ranks after the floor; here the ranking comes first, because it costs seconds, every trial's run then
holds it, and a ceiling that misses is explained by it.
"""

from __future__ import annotations

from qflow.search.objective import accurate, meets, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.study.session import Session
from qflow.study.stages import search_mix

from . import int8, int16


def run(session: Session) -> None:
    """What is measured, in order."""
    ceiling, floor = int16.branch(session), int8.branch(session)
    if accurate(ceiling):
        mix(session, floor, ceiling)


def mix(session: Session, floor: FinishedTrial, ceiling: FinishedTrial) -> None:
    """The cheapest mix between floor and ceiling; nothing to do where the floor meets the goal or bursts a budget."""
    if meets(floor):
        return
    over = over_budget(floor)
    if over:
        found = ", ".join(f"{name} by {by:.4g}" for name, by in over.items())
        session.decide("int8/int16", f"all-int8 itself exceeds {found}: relax the budget or change the model")
        return
    search_mix(session, floor, ceiling)
    best = session.best
    if best is not None:
        m = best.outcome.metrics
        fp16 = f" beside {m['qconfig/n_float16']:.0f} in fp16" if m.get("qconfig/n_float16") else ""
        session.decide(
            "int8/int16",
            f"trial {best.number} meets the goal with {m['qconfig/n_int16']:.0f} int16 operators{fp16}: drop "
            f"{m['accuracy/drop']:+.4f}, {m['cost/latency_ms']:.3f} ms against "
            f"{floor.outcome.metrics['cost/latency_ms']:.3f} all-int8 and "
            f"{ceiling.outcome.metrics['cost/latency_ms']:.3f} all-int16",
        )
    else:
        session.decide("int8/int16", "no mix that was tried meets the goal")
