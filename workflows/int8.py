"""All int8: python -m qflow.tune +experiment=int8

The cheapest qconfig there is: calibration is searched, nothing is promoted; what misses may be trained (qat).
"""

from __future__ import annotations

from qflow.search.objective import CONSTRAINT, meets, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent
from qflow.study.session import Session
from qflow.study.stages import ALL_INT8, baseline, baseline_point, best_calibration


def run(session: Session) -> None:
    """What is measured, in order."""
    floor = branch(session)
    if over := over_budget(floor):
        session.decide("int8", f"all-int8 itself exceeds {', '.join(over)}: relax the budget or change the model")
    elif not meets(floor):
        tune_calibration(session)


def branch(session: Session) -> FinishedTrial:
    """Measure the floor and say what follows from it."""
    floor = baseline(session, ALL_INT8)
    drop, miss = floor.outcome.metrics["accuracy/drop"], floor.outcome.constraints[CONSTRAINT]
    if meets(floor):
        session.decide(ALL_INT8, f"drop {drop:+.4f} meets the goal: no operator needs int16")
    else:
        session.decide(ALL_INT8, f"drop {drop:+.4f}, {miss:.4f} beyond the goal" if miss > 0 else "exceeds a budget")
    return floor


def tune_calibration(session: Session) -> None:
    """The guide's basic tuning: other calibration methods, then what else of calibration is searched."""
    before, ended = dict(session.kept), "every point of the space is tried"
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
        assert found is not None  # the floor at least
        method = found.params.get("calibration.method", session.config.calibration.method)
        drop = found.outcome.metrics["accuracy/drop"]
        say(f"best calibration {method}, drop {drop:+.4f}" + ("" if meets(found) else f"; {ended}"))
    if session.untrained_best is None:
        training = (
            "training is next" if session.budget.reserved else "train (qat), or give int16 (+experiment=int8_int16)"
        )
        session.decide("int8", f"calibration is not enough: {training}")
