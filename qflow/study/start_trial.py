"""The trial of the user's present mix (`search.start`), and whether the study has found a better one."""

from __future__ import annotations

from qflow.search.noise import Margin
from qflow.search.objective import CONSTRAINT, meets, merit, over_budget
from qflow.search.outcome import FailedTrial, FinishedTrial
from qflow.search.strategies import BudgetSpent
from qflow.study.baselines import ALL_INT8, ALL_INT16, METHOD, method_of
from qflow.study.paired import applied, paired_noise
from qflow.study.session import Session

START, YOURS = "start", "your mix"  # label of the trial, and of its row among the baselines


def measure_start(session: Session) -> None:
    """Measure the mix under the calibration method of the baselines; it is from then on the one to beat."""
    if session.start is None:
        return
    ends = [session.baselines[label] for label in (ALL_INT16, ALL_INT8) if label in session.baselines]
    method = {METHOD: method_of(session, ends[0].params)} if ends else {}
    point = {**session.base(), **method, **session.start.values}
    try:
        trial = session.measure(point, START)
    except BudgetSpent as spent:
        session.decide(START, f"{YOURS} ({session.start.imported.source}) was not measured: {spent}")
        raise
    if trial is None:
        found = session.driver.known(point) if session.driver else None
        why = found.reason if isinstance(found, FailedTrial) else "it failed"
        session.decide(START, f"{YOURS} ({session.start.imported.source}) has no figures: {why}")
        return
    session.baselines[YOURS] = trial
    over = over_budget(trial)
    verdict = "meets the goal" if meets(trial) else f"exceeds {', '.join(over)}" if over else "misses the goal"
    session.decide(
        START, f"{YOURS} ({session.start.imported.source}) is the one to beat: {_figures(trial)}; it {verdict}"
    )


def _figures(trial: FinishedTrial) -> str:
    m = trial.outcome.metrics
    return f"drop {m['accuracy/drop']:+.4f}, {m['cost/latency_ms']:.3f} ms"


def against_start(session: Session, shown: FinishedTrial) -> str:
    """Return whether `shown`, the best mix or the nearest miss, beats the user's mix, as a line below the final table.

    The best is the better one by the aims of the study; the noise of the two drops says how sure that is.
    """
    if session.start is None:
        return ""
    trial = session.baselines.get(YOURS)
    if trial is None:
        return f"\n{YOURS:<12}has no figures: the decisions say why"
    if shown.number == trial.number:
        return (
            f"\n{YOURS:<12}not beaten: of all that was tried it is {'the best' if meets(shown) else 'the nearest miss'}"
        )
    a, b = trial.outcome.metrics, shown.outcome.metrics
    change = session.evaluator.pricer.change(applied(session, trial), applied(session, shown))
    margin = Margin(a["accuracy/drop"] - b["accuracy/drop"], paired_noise(session, shown, trial))
    noise = f"{margin}: {'beyond it' if margin.sure else 'within it'}"
    if not margin.noise.known:
        noise = f"{abs(margin.distance):.4f}, noise {margin.noise.how}"
    latency = (
        f"{b['cost/latency_ms']:.3f} ms against {a['cost/latency_ms']:.3f} ({change.ratio:.2f} of its BPU time "
        f"[{change.low:.2f}, {change.high:.2f}])"
    )
    drop = f"drop {b['accuracy/drop']:+.4f} against {a['accuracy/drop']:+.4f} (difference {noise})"
    return f"\n{YOURS:<12}{_word(session, trial, shown)}\n{'':<12}{latency}\n{'':<12}{drop}"


def _word(session: Session, trial: FinishedTrial, shown: FinishedTrial) -> str:
    if not meets(shown):
        nearer = shown.outcome.constraints[CONSTRAINT] < trial.outcome.constraints[CONSTRAINT]
        return "not beaten, since no mix meets the goal; the nearest miss is " + ("nearer" if nearer else "no nearer")
    if not meets(trial):
        return "beaten: it misses the goal, and the best meets it"
    ranking = session.goal.ranking
    return "beaten" if merit(shown, ranking) < merit(trial, ranking) else "not beaten"
