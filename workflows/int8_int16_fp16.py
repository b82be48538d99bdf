"""The guide's last branch: python -m qflow.tune +experiment=int8_int16_fp16

The fp16 set of int16/fp16 is kept, and the share of int16 is searched among all other operators.
"""

from __future__ import annotations

from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import FLOAT16
from qflow.study.session import Session
from qflow.study.stages import ALL_INT8, baseline_point

from . import int8_int16, int16, int16_fp16


def run(session: Session) -> None:
    """What is measured, in order."""
    ceiling = int16.branch(session)
    branch(session, ceiling)


def branch(session: Session, ceiling: FinishedTrial) -> None:
    """int8/int16 under the fp16 set that the ceiling needs; under none where it needs none."""
    lifted = ceiling if accurate(ceiling) else int16_fp16.branch(session)
    if lifted is None:
        return
    if lifted is not ceiling:
        session.kept[FLOAT16] = lifted.params[FLOAT16]
        session.baselines["int16/fp16"] = lifted
    label = "int8/fp16" if lifted is not ceiling else ALL_INT8
    floor = session.measure(baseline_point(session, ALL_INT8), label)
    if floor is None:
        return
    session.baselines[label] = floor
    int8_int16.mix(session, floor, lifted)
