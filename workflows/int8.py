"""All int8: python -m qflow.tune +experiment=int8

This is the cheapest qconfig. Calibration is searched, and no operator is promoted. If the goal is missed, training
(qat) may follow.
"""

from __future__ import annotations

from qflow.search.objective import CONSTRAINT, meets, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent
from qflow.study.baselines import ALL_INT8, baseline, baseline_point, method_of
from qflow.study.budget import halted
from qflow.study.session import Session
from qflow.study.start_trial import measure_start
from qflow.study.unrepaired import better_without


def run(session: Session) -> None:
    """Measure in this order."""
    int8 = branch(session)
    measure_start(session)
    if int8 is not None and (over := over_budget(int8)):
        session.decide("int8", f"all-int8 itself exceeds {', '.join(over)}: relax the budget or change the model")
    elif not meets(int8):
        tune_calibration(session)


def branch(session: Session) -> FinishedTrial | None:
    """Measure all-int8 and record what follows from it; None if its outputs are not finite."""
    int8 = baseline(session, ALL_INT8)
    if int8 is None:
        session.decide(ALL_INT8, f"its outputs are not finite, which misses the goal{_unstable(session)}")
        return None
    int8 = better_without(session, int8)
    drop, miss = int8.outcome.metrics["accuracy/drop"], int8.outcome.constraints[CONSTRAINT]
    method = method_of(session, int8.params)
    if meets(int8):
        session.decide(ALL_INT8, f"drop {drop:+.4f} under {method} meets the goal: no operator needs int16")
    else:
        missed = f"drop {drop:+.4f} under {method}, {miss:.4f} beyond the goal"
        session.decide(ALL_INT8, missed if miss > 0 else "exceeds a budget")
    return int8


def _unstable(session: Session) -> str:
    """Return the operators that alone at int8 make the outputs infinite or NaN."""
    names = [name for name, score in session.evaluator.scores.items() if score == float("inf")]
    return f": already alone at int8, {', '.join(names)} does that" if names else ""


def tune_calibration(session: Session) -> None:
    """Try the points of the search space at all-int8: the other calibration settings."""
    before, ended = dict(session.kept), ""
    session.kept |= {k: v for k, v in baseline_point(session, ALL_INT8).items() if k.startswith("qconfig.")}
    with session.console.stage("calibration") as say:
        try:
            while session.untrained_best is None and session.sample():
                pass
        except BudgetSpent as spent:
            ended = str(spent)
        finally:
            session.kept = before
        ended = ended or halted(session.driver) or "every point of the space was measured"
        found = session.untrained_best or nearest_miss(session.trials, session.goal.ranking)
        if found is None:
            say(f"no calibration gives finite outputs; {ended}")
        else:
            drop = found.outcome.metrics["accuracy/drop"]
            best = f"best calibration {method_of(session, found.params)}, drop {drop:+.4f}"
            say(best + ("" if meets(found) else f"; {ended}"))
    if session.untrained_best is None:
        training = (
            "training is next" if session.budget.reserved else "train (qat), or add int16 (+experiment=int8_int16)"
        )
        session.decide("int8", f"calibration is not enough: {training}")
