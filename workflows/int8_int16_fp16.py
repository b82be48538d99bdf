"""The guide's int8/int16/fp16 branch: python -m qflow.tune +experiment=int8_int16_fp16

The fp16 operators that the int16/fp16 branch found are kept, and int16 is searched among all other operators.
"""

from __future__ import annotations

from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import FLOAT16
from qflow.study.session import Session
from qflow.study.stages import ALL_INT8, baseline_point

from . import int8_int16, int16, int16_fp16


def run(session: Session) -> None:
    """Measure in this order."""
    branch(session, int16.branch(session))


def branch(session: Session, int16_baseline: FinishedTrial) -> None:
    """Search int8/int16 beside the fp16 operators that all-int16 needs to meet the goal, if it needs any."""
    with_fp16 = not accurate(int16_baseline)
    high = int16_fp16.branch(session) if with_fp16 else int16_baseline
    if high is None:
        return
    if with_fp16:
        session.kept[FLOAT16] = high.params[FLOAT16]
        session.baselines["int16/fp16"] = high
    label = "int8/fp16" if with_fp16 else ALL_INT8
    low = session.measure(baseline_point(session, ALL_INT8), label)
    if low is None:
        return
    session.baselines[label] = low
    int8_int16.mix(session, low, high)
