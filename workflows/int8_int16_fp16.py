"""The guide's int8/int16/fp16 branch: python -m qflow.tune +experiment=int8_int16_fp16

The fp16 operators that the int16/fp16 branch found are kept, and int16 is searched among all other operators and their
weights, by the sensitivities of the int8/fp16 model. Where int16 weights alone meet the goal, no operator gets fp16.
"""

from __future__ import annotations

from qflow.search.objective import accurate, meets
from qflow.search.outcome import FinishedTrial
from qflow.study.baselines import ALL_INT8, baseline_point, best_calibration
from qflow.study.missed import measure_promising
from qflow.study.session import Session
from qflow.study.stages import rank_again
from qflow.study.start_trial import measure_start

from . import int8, int8_int16, int16, int16_fp16

INT8_FP16 = "int8/fp16"


def run(session: Session) -> None:
    """Measure in this order."""
    baseline = int16.branch(session)
    measure_start(session)
    high = baseline if accurate(baseline) else int16.with_weights(session, baseline)
    if accurate(high):
        int8_int16.mix(session, int8.branch(session), high)
    else:
        branch(session, baseline, high)
    measure_promising(session)


def branch(session: Session, baseline: FinishedTrial | None, high: FinishedTrial | None) -> None:
    """Search int8/int16 beside the fp16 operators that are needed to meet the goal.

    `baseline` is all-int16, `high` what int16 weights have reached; both miss the goal.
    """
    met = int16_fp16.branch(session, baseline, high)
    if met is None:
        return
    session.baselines["int16/fp16"] = met
    point = baseline_point(session, ALL_INT8)
    low = best_calibration(session, point, INT8_FP16)
    if low is not None:
        session.baselines[INT8_FP16] = low
    if not meets(low):
        rank_again(session, INT8_FP16, low.params if low else point)
    int8_int16.mix(session, low, met)
