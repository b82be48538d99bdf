"""The guide's whole figure: python -m qflow.tune +experiment=full

check -> all-int16 (ceiling)
meets:   all-int8 (floor) -> int8/int16 by sensitivity
misses:  int16/fp16 -> int8/int16/fp16 with the fp16 set kept
-> training where nothing meets the goal (qat.apply=after_search)
"""

from __future__ import annotations

from qflow.search.objective import accurate, meets
from qflow.study.session import Session

from . import int8, int8_int16, int8_int16_fp16, int16


def run(session: Session) -> None:
    """What is measured, in order."""
    ceiling, floor = int16.branch(session), int8.branch(session)
    if accurate(ceiling):
        int8_int16.mix(session, floor, ceiling)
    elif not meets(floor):
        int8_int16_fp16.branch(session, ceiling)
