"""All int8: python -m qflow.tune +experiment=int8

This is the cheapest qconfig. Calibration is searched, and no operator is promoted. If the goal is missed, training
(qat) may follow.
"""

from __future__ import annotations

from qflow.search.objective import CONSTRAINT, meets, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent
from qflow.study.session import Session
from qflow.study.stages import ALL_INT8, baseline, baseline_point, best_calibration


def run(session: Session) -> None:
    """Measure in this order."""
    int8 = branch(session)
    if over := over_budget(int8):
        session.decide("int8", f"all-int8 itself exceeds {', '.join(over)}: relax the budget or change the model")
    elif not meets(int8):
        tune_calibration(session)


def branch(session: Session) -> FinishedTrial:
    """Measure all-int8 and record what follows from it."""
    int8 = baseline(session, ALL_INT8)
    drop, miss = int8.outcome.metrics["accuracy/drop"], int8.outcome.constraints[CONSTRAINT]
    if meets(int8):
        session.decide(ALL_INT8, f"drop {drop:+.4f} meets the goal: no operator needs int16")
    else:
        session.decide(ALL_INT8, f"drop {drop:+.4f}, {miss:.4f} beyond the goal" if miss > 0 else "exceeds a budget")
    return int8


def tune_calibration(session: Session) -> None:
    """Try other calibration methods (the guide's basic tuning), then the other searched calibration settings."""
    before, ended = dict(session.kept), "every point of the space was measured"
    session.kept |= {k: v for k, v in baseline_point(session, ALL_INT8).items() if k.startswith("qconfig.")}
    with session.console.stage("calibration") as say:
        try:
            best_calibration(session)
            while session.untrained_best is None and session.sample():
                pass
        except BudgetSpent as spent:
            ended = str(spent)
        finally:
            session.kept = before
        found = session.untrained_best or nearest_miss(session.trials, session.goal.ranking)
        assert found is not None  # all-int8 at least
        method = found.params.get("calibration.method", session.config.calibration.method)
        drop = found.outcome.metrics["accuracy/drop"]
        say(f"best calibration {method}, drop {drop:+.4f}" + ("" if meets(found) else f"; {ended}"))
    if session.untrained_best is None:
        training = (
            "training is next" if session.budget.reserved else "train (qat), or add int16 (+experiment=int8_int16)"
        )
        session.decide("int8", f"calibration is not enough: {training}")
