"""The result of a study as plain fields, for programs (`--json`; config/study_results.py says what each is)."""

from __future__ import annotations

from typing import Any

from qflow.config.study_results import TrialFields
from qflow.core.credentials import masked
from qflow.search.objective import meets, nearest_miss
from qflow.search.outcome import FinishedTrial
from qflow.study.session import Session


def study_record(session: Session) -> dict[str, Any]:
    """Return the goal, whether it is met, the best trial or the nearest miss, the baselines and all decisions."""
    nearest = nearest_miss(session.trials, session.goal.ranking) if session.best is None else None
    return {
        "study": session.study.name,
        "experiment": session.config.tracking.experiment,
        "uri": masked(session.tracker.uri),
        "root": str(session.root),
        "run": session.study_run,
        "goal": str(session.goal),
        "met": session.best is not None,
        "float": {session.accuracy: session.evaluator.float_metric},
        "best": trial_record(session.best),
        "nearest": trial_record(nearest),
        "baselines": {label: trial_record(trial) for label, trial in session.baselines.items()},
        "trials": len(session.trials),
        "decisions": [{"stage": stage, "text": text} for stage, text in session.decisions],
        "seconds": round(session.console.seconds, 1),
        "written": str(session.root / "studies" / session.study.name),
    }


def trial_record(trial: FinishedTrial | None) -> TrialFields | None:
    """Return the fields of a trial; None without one."""
    return trial_fields(trial) if trial is not None else None


def trial_fields(trial: FinishedTrial) -> TrialFields:
    """Return the fields of a trial."""
    return {
        "trial": trial.number,
        "run": trial.run_id,
        "label": trial.label,
        "qconfig": trial.outcome.tags["qflow.qconfig"],
        "meets": meets(trial),
        "params": dict(trial.params),
        "metrics": dict(trial.outcome.metrics),
    }
