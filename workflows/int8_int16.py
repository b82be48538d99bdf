"""The guide's int8/int16 branch: python -m qflow.tune +experiment=int8_int16

    float model -> trace, fuse, check -> calibrate -> bad cases -> layer by layer -> sensitivity -> advice
        -> all-int16 and all-int8 (the baselines)
        all-int16 misses the goal:   stop, unless int16 weights make up for it
        all-int8 meets the goal:     stop; no operator needs int16
        -> search calibration and int16 for the cheapest mix that meets the goal (search.strategy)
        -> train if no mix meets it, then demote int16 operators (qat.apply=after_search)

The guide ranks the operators after it has measured all-int8. Here the ranking comes first, because it takes only
seconds, every trial's run then holds it, and it explains an all-int16 that misses the goal.
"""

from __future__ import annotations

from qflow.search.objective import accurate, meets, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.study.baselines import measure_baselines
from qflow.study.missed import measure_promising
from qflow.study.mixes import search_mix
from qflow.study.session import Session
from qflow.study.start_trial import measure_start

from . import int8, int16


def run(session: Session) -> None:
    """Measure in this order; the two baselines at once if there are workers for that."""
    measure_baselines(session)
    int16_baseline, int8_baseline = int16.branch(session), int8.branch(session)
    measure_start(session)
    high = int16_baseline
    if not accurate(high) and not meets(int8_baseline):
        high = int16.with_weights(session, int16_baseline)
    if accurate(high):
        mix(session, int8_baseline, high)
    measure_promising(session)


def mix(session: Session, int8_baseline: FinishedTrial | None, int16_baseline: FinishedTrial) -> None:
    """Search the cheapest mix that meets the goal, unless all-int8 meets it or exceeds a budget."""
    if meets(int8_baseline):
        return
    over = over_budget(int8_baseline) if int8_baseline else {}
    if over:
        found = ", ".join(f"{name} by {by:.4g}" for name, by in over.items())
        session.decide("int8/int16", f"all-int8 itself exceeds {found}: relax the budget or change the model")
        return
    search_mix(session, int8_baseline, int16_baseline)
    best = session.untrained_best
    if best is not None:
        m = best.outcome.metrics
        fp16 = f" beside {m['qconfig/n_float16']:.0f} in fp16" if m.get("qconfig/n_float16") else ""
        weights = f" and {n:.0f} int16 weight{'s' * (n > 1)}" if (n := m.get("qconfig/n_int16_weights", 0.0)) else ""
        ends = {label: t for label, t in session.baselines.items() if t in (int8_baseline, int16_baseline)}
        against = [f"{t.outcome.metrics['cost/latency_ms']:.3f} {label}" for label, t in ends.items()]
        session.decide(
            "int8/int16",
            f"trial {best.number} meets the goal with {m['qconfig/n_int16']:.0f} int16 operators{weights}{fp16}: drop "
            f"{m['accuracy/drop']:+.4f}, {m['cost/latency_ms']:.3f} ms against {' and '.join(against)}",
        )
    else:
        session.decide("int8/int16", "no mix that was tried meets the goal")
