"""The guide's int8/int16/fp16 branch: python -m qflow.tune +experiment=int8_int16_fp16

The fp16 operators that the int16/fp16 branch found are kept, and int16 is searched among all other operators, by the
sensitivities of the int8/fp16 model.
"""

from __future__ import annotations

from qflow.search.objective import accurate, meets
from qflow.search.outcome import FinishedTrial
from qflow.study.baselines import ALL_INT8, baseline_point, best_calibration
from qflow.study.missed import measure_promising
from qflow.study.session import Session
from qflow.study.stages import rank_again

from . import int8, int8_int16, int16, int16_fp16

INT8_FP16 = "int8/fp16"


def run(session: Session) -> None:
    """Measure in this order."""
    branch(session, int16.branch(session))
    measure_promising(session)


def branch(session: Session, int16_baseline: FinishedTrial | None) -> None:
    """Search int8/int16 beside the fp16 operators that all-int16 needs to meet the goal, if it needs any."""
    with_fp16 = not accurate(int16_baseline)
    high = int16_fp16.branch(session, int16_baseline) if with_fp16 else int16_baseline
    if high is None:
        return
    if with_fp16:
        session.baselines["int16/fp16"] = high
    else:
        int8_int16.mix(session, int8.branch(session), high)
        return
    point = baseline_point(session, ALL_INT8)
    low = best_calibration(session, point, INT8_FP16)
    if low is not None:
        session.baselines[INT8_FP16] = low
    if not meets(low):
        rank_again(session, INT8_FP16, low.params if low else point)
    int8_int16.mix(session, low, high)
