"""What MLflow shows of a finished study: the rank of its trials, the best and the Pareto set, and the saved view."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence

from qflow.core.record import to_json
from qflow.core.store import write_whole
from qflow.search.objective import meets, pareto_set, ranked
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import ERROR_SHARE, RATIO
from qflow.study.session import Session
from qflow.tracking.limits import param_name
from qflow.tracking.views import DROP, RANK, save_view, study_url, ui_host

BEST, PARETO = "qflow.best", "qflow.pareto"  # tags of trials: true or false
QAT_METRICS = ("qat/steps", "qat/loss")
QAT_PARAMS = ("qat.learning_rate", "qat.moving", "qat.weight_decay")
FENCE = 3.0  # times the interquartile range above the third quartile: Tukey's fence for values that are far out


def mark_trials(session: Session) -> None:
    """Write the rank of each trial as a metric, and as tags whether it is the best and whether no other dominates it.

    1 is the best. What an earlier start has written and is still true is not written again.
    """
    best, trials = session.best, session.trials
    front = {t.run_id for t in pareto_set(trials, list(session.goal.optimize.values()))}
    place = session.root / "studies" / session.study.name / "marks.json"
    known = json.loads(place.read_text()) if place.exists() else {}
    marks = {
        trial.run_id: [rank, trial is best, trial.run_id in front]
        for rank, trial in enumerate(ranked(trials, session.goal.ranking), 1)
    }
    for run_id, (rank, is_best, is_pareto) in marks.items():
        if known.get(run_id) != marks[run_id]:
            tags = {BEST: str(is_best).lower(), PARETO: str(is_pareto).lower()}
            session.tracker.log_study(run_id, metrics={RANK: float(rank)}, tags=tags)
    write_whole(place, to_json(marks))


def trials_url(session: Session) -> str:
    """Save a view of accuracy against latency in MLflow, and return the address where `mlflow ui` shows it."""
    tracker, trials = session.tracker, session.trials
    as_share = (RATIO, ERROR_SHARE)  # the column of the share of int16 shows them
    searched = [param_name(key) for key in session.study.space if key not in as_share]
    trained = any(trial.outcome.metrics.get("qat/steps") for trial in trials)
    key = save_view(
        tracker,
        session.study.name,
        metrics=(session.accuracy, *(QAT_METRICS if trained else ())),
        params=list(dict.fromkeys([*searched, *(QAT_PARAMS if trained else ())])),
        largest=largest_shown(trials),
    )
    return study_url(ui_host(tracker.uri), tracker.experiment_id, session.study.name, key)


def largest_shown(trials: Sequence[FinishedTrial]) -> float | None:
    """Return the largest drop that the view shows, beyond which one would flatten the differences of all others.

    That is `FENCE` interquartile ranges above the third quartile, or the drop of a trial that meets the goal if it is
    larger; None if no trial lies beyond. Trials that stopped early have the worst possible drop in place of their own.
    """
    drops = [trial.outcome.metrics[DROP] for trial in trials]
    own = [trial.outcome.metrics[DROP] for trial in trials if not trial.stopped]
    if len(own) < 4:  # quartiles of fewer say nothing
        return None
    low, _, high = statistics.quantiles(own, n=4, method="inclusive")
    most = max([high + FENCE * (high - low), *(t.outcome.metrics[DROP] for t in trials if meets(t))])
    return most if max(drops) > most else None
