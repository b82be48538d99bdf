"""The int16 baseline: python -m qflow.tune +experiment=int16

All operators run at int16, which is the upper bound of the accuracy of int8/int16 with int8 weights. If it misses the
goal, the decision names the operators that cause this, and int16 weights are tried where a weight is the cause.
"""

from __future__ import annotations

import math

from qflow.core.dtype import QDtype
from qflow.search.objective import CONSTRAINT, accurate
from qflow.search.outcome import FinishedTrial
from qflow.study.int16_weights import raise_weights, weights_that_matter
from qflow.study.session import Session
from qflow.study.stages import ALL_INT16, baseline, baseline_point, int16_miss_reason


def run(session: Session) -> None:
    """Measure in this order."""
    if not accurate(branch(session)):
        with_weights(session)


def branch(session: Session) -> FinishedTrial:
    """Measure all-int16 and record what follows from it."""
    int16 = baseline(session, ALL_INT16)
    drop, goal = int16.outcome.metrics["accuracy/drop"], session.goal.max_drop
    if accurate(int16):
        session.decide(ALL_INT16, f"drop {drop:+.4f} meets {goal:g}: int8 comes next (+experiment=int8, int8_int16)")
    else:
        reason = int16_miss_reason(session.evaluator)
        miss = int16.outcome.constraints[CONSTRAINT]
        weights = weights_that_matter(session, baseline_point(session, ALL_INT16), QDtype.qint16)
        following = "int16 weights are next" if weights else "int16/fp16 is next (+experiment=int16_fp16)"
        session.decide(ALL_INT16, f"misses the goal by {miss:.4f}: {reason}; {following}")
    return int16


def with_weights(session: Session) -> FinishedTrial | None:
    """Return the trial with the fewest int16 weights, and all else at int16 that may be, that meets the goal, or None.

    Where the device does not multiply int16 by int16, the inputs of these weights are int8.
    """
    point = baseline_point(session, ALL_INT16)
    order = weights_that_matter(session, point, QDtype.qint16)
    if not order:
        return None
    found = raise_weights(session, point, QDtype.qint16)
    if found is None:
        tried = [t for t in session.trials if t.outcome.metrics["qconfig/n_int16_weights"]]
        least = min((t.outcome.metrics["accuracy/drop"] for t in tried), default=math.nan)
        session.decide(
            "int16 weights",
            f"the drop is {least:+.4f} at least with up to {len(order)} int16 weights; int16/fp16 is next",
        )
        return None
    count = int(found.outcome.metrics["qconfig/n_int16_weights"])
    session.baselines["int16-weights"] = found
    session.decide(
        "int16 weights",
        f"int16 for {count} of {len(order)} weights that gain from it reduces the drop of all-int16 to "
        f"{found.outcome.metrics['accuracy/drop']:+.4f}: {', '.join(order[:count])}; no operator needs fp16",
    )
    return found
