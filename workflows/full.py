"""The whole decision tree of the tuning guide: python -m qflow.tune +experiment=full

check, then measure the baselines all-int16 and all-int8
all-int16 meets the goal:    int8/int16, unless all-int8 meets it too
neither meets the goal:      int16 weights, then int8/int16 with weights;
                             if they do not meet it, fp16 on top of them, then int8/int16/fp16 with these fp16 operators
no mix meets the goal:       mixes that are predicted to meet it; then training (qat.apply=after_search)
"""

from __future__ import annotations

from qflow.search.objective import accurate, meets
from qflow.study.baselines import measure_baselines
from qflow.study.missed import measure_promising
from qflow.study.session import Session
from qflow.study.start_trial import measure_start

from . import int8, int8_int16, int8_int16_fp16, int16


def run(session: Session) -> None:
    """Measure in this order; the two baselines at once if there are workers for that."""
    measure_baselines(session)
    int16_baseline, int8_baseline = int16.branch(session), int8.branch(session)
    measure_start(session)
    if accurate(int16_baseline):
        int8_int16.mix(session, int8_baseline, int16_baseline)
    elif not meets(int8_baseline):
        high = int16.with_weights(session, int16_baseline)
        if accurate(high):
            int8_int16.mix(session, int8_baseline, high)
        else:
            int8_int16_fp16.branch(session, int16_baseline, high)
    measure_promising(session)
