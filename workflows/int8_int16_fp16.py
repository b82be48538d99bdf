"""The guide's last branch: python -m qflow.tune +experiment=int8_int16_fp16

The fp16 set of int16/fp16 is kept, and the share of int16 is searched among all other operators.
"""

from __future__ import annotations

from qflow.finish import finish
from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.session import Session
from qflow.stages import FLOAT16, RATIO, begin
from qflow.train_stage import train_nearest

from . import int8_int16, int16, int16_fp16


def run(session: Session) -> int:
    """All stages; returns the exit code: 0 goal met, 1 not."""
    begin(session)
    ceiling = int16.branch(session)
    branch(session, ceiling)
    train_nearest(session)
    return finish(session)


def branch(session: Session, ceiling: FinishedTrial) -> None:
    """int8/int16 under the fp16 set that the ceiling needs; under none where it needs none."""
    lifted = ceiling if accurate(ceiling) else int16_fp16.branch(session)
    if lifted is None:
        return
    if lifted is not ceiling:
        session.kept[FLOAT16] = lifted.params[FLOAT16]
    base = session.base()
    floor = session.measure({**base, RATIO: 0.0}, "int8/fp16" if lifted is not ceiling else "all-int8")
    if floor is None:
        return
    session.baselines["int8/fp16" if lifted is not ceiling else "all-int8"] = floor
    int8_int16.mix(session, floor, lifted)
