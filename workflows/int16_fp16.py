"""The guide's int16/fp16 branch: python -m qflow.tune +experiment=int16_fp16

If all-int16 misses the goal, int16 weights are tried where a weight is the cause. If they miss it too, a few operators
of the vector unit get fp16, in the order of how much it lowers their error in what int16 weights have reached.
"""

from __future__ import annotations

from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.study.baselines import ALL_INT16
from qflow.study.int16_weights import weights_beside
from qflow.study.mixes import raise_float16
from qflow.study.session import Session
from qflow.study.start_trial import measure_start

from . import int16

WITH_WEIGHTS = "int16 with weights"


def run(session: Session) -> None:
    """Measure in this order."""
    baseline = int16.branch(session)
    measure_start(session)
    if not accurate(baseline):
        high = int16.with_weights(session, baseline)
        if not accurate(high):
            branch(session, baseline, high)


def branch(session: Session, baseline: FinishedTrial | None, high: FinishedTrial | None) -> FinishedTrial | None:
    """Return the trial with the fewest fp16 operators in `high`, or else in all-int16, that meets the goal, or None.

    `baseline` is all-int16, `high` what int16 weights have reached. Where the errors that fp16 removes hid those of the
    weights, int16 weights are tried again beside fp16. All further trials keep the fp16 operators.
    """
    started = len(session.measured)
    starts = [(high, WITH_WEIGHTS), (baseline, ALL_INT16)] if high is not baseline else [(baseline, ALL_INT16)]
    for start, title in starts:
        found, order = raise_float16(session, start.params if start else None, title)
        if found is not None:
            return _keep(session, found, order)
    point = weights_beside(session, session.measured[started:], order)
    if point is not None:
        found, order = raise_float16(session, point, WITH_WEIGHTS)
        if found is not None:
            return _keep(session, found, order)
    missed = f"the goal is missed even with fp16 on all {len(order)} operators that gain from it"
    weights = any(t.outcome.metrics.get("qconfig/n_int16_weights") for t in session.measured)
    beside = ", with int16 weights and without" if weights else ""
    session.decide("int16/fp16", missed + beside if order else "the goal is missed, and no operator gains from fp16")
    return None


def _keep(session: Session, found: FinishedTrial, order: list[str]) -> FinishedTrial:
    """Keep the fp16 operators of `found` among the settings `order` for all further trials, and say so."""
    chosen = {key: "float16" for key in order if found.params.get(key) == "float16"}
    session.kept |= chosen
    metrics, names = found.outcome.metrics, [key.removeprefix("qconfig.modules.") for key in chosen]
    count = int(metrics.get("qconfig/n_int16_weights", 0.0))
    beside = f" with {count} int16 weight{'s' * (count > 1)}" if count else ""
    session.decide(
        "int16/fp16",
        f"{len(names)} operator{'s' * (len(names) > 1)} in fp16 reduce the drop of all-int16{beside} to "
        f"{metrics['accuracy/drop']:+.4f}: {', '.join(names)}; they are kept for int8/int16/fp16 "
        "(+experiment=int8_int16_fp16)",
    )
    return found
