"""All int8: python -m qflow.tune +experiment=int8

The cheapest qconfig there is: calibration is searched, nothing is promoted; what misses may be trained (qat).
"""

from __future__ import annotations

from qflow.finish import finish
from qflow.search.objective import CONSTRAINT, meets, nearest_miss
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent
from qflow.session import Session
from qflow.stages import ALL_INT8, RATIO, baseline, begin, best_calibration
from qflow.train_stage import train_nearest


def run(session: Session) -> int:
    """All stages; returns the exit code: 0 goal met, 1 not."""
    begin(session)
    floor = branch(session)
    if not meets(floor):
        tune_calibration(session)
    train_nearest(session)
    if session.best is None:
        session.decide("int8", "calibration and training are not enough: int8/int16 is next (+experiment=int8_int16)")
    return finish(session)


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
    with session.console.stage("calibration") as say:
        try:
            best = best_calibration(session)
            session.kept[RATIO] = 0.0
            while session.untrained_best is None and session.sample():
                pass
        except BudgetSpent as spent:
            session.console.say(f"{'budget':<12} {spent}")
        finally:
            session.kept.pop(RATIO, None)
        found = nearest_miss(session.trials, session.goal.ranking)
        best = dict(found.params) if found else best
        say(f"best calibration {best.get('calibration.method', session.config.calibration.method)}")
