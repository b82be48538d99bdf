"""An Optuna study as plain data, from one storage and into another: no pickle, no database file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from qflow.core.errors import BundleError, TrackingError
from qflow.search.database import open_storage, place_of


def study_names(storage: str | Path) -> list[str]:
    """Return the names of the studies in a storage."""
    return sorted(optuna.get_all_study_names(open_storage(place_of(storage)[0])))


def study_record(storage: str | Path, name: str) -> dict[str, Any]:
    """Return the study `name` as builtins that JSON holds. Raises TrackingError for a study with a running trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name=name, storage=open_storage(place_of(storage)[0]))
    trials = study.get_trials(deepcopy=False)
    running = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
    if running:
        raise TrackingError(
            f"A study is bundled when no trial runs, but got trial {running[0]} of {name} running. Start its "
            "qflow.tune once more: it ends what is open."
        )
    return {
        "name": name,
        "directions": [direction.name for direction in study.directions],
        "user_attrs": dict(study.user_attrs),
        "trials": [_trial(trial) for trial in trials],
    }


def restore_study(storage: str | Path, record: Mapping[str, Any]) -> None:
    """Create the study of `record` in another storage. Raises BundleError if it is no study, or the name is taken."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = open_storage(place_of(storage)[0])
    try:
        trials = [_made(trial) for trial in record["trials"]]
        directions = [StudyDirection[name] for name in record["directions"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:80]
        raise BundleError(f"A study in a bundle is one that qflow wrote, but got {text}. Bundle it again.") from error
    try:
        study = optuna.create_study(storage=opened, study_name=record["name"], directions=directions)
    except optuna.exceptions.DuplicatedStudyError as error:
        raise BundleError(taken(record["name"])) from error
    try:
        for key, value in record["user_attrs"].items():
            study.set_user_attr(key, value)
        study.add_trials(trials)
    except BaseException:
        optuna.delete_study(study_name=record["name"], storage=opened)
        raise


def taken(name: str) -> str:
    """Return the line for a study whose name exists."""
    return (
        f"An imported study has a name that the store does not know, but got {name}, which exists. Import it into "
        "another: root=<folder>."
    )


def _trial(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    return {
        "state": trial.state.name,
        "values": trial.values,
        "params": dict(trial.params),
        "distributions": {name: json.loads(distribution_to_json(d)) for name, d in trial.distributions.items()},
        "user_attrs": dict(trial.user_attrs),
        "system_attrs": dict(trial.system_attrs),
    }


def _made(record: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    return create_trial(
        state=TrialState[record["state"]],
        values=record["values"],
        params=record["params"],
        distributions={k: json_to_distribution(json.dumps(d)) for k, d in record["distributions"].items()},
        user_attrs=record["user_attrs"],
        system_attrs=record["system_attrs"],
    )
