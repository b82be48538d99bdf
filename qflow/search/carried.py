"""An Optuna study as plain data, from one storage and into another: no pickle, no database file."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from qflow.core.credentials import masked
from qflow.core.errors import BundleError, TrackingError
from qflow.core.store import sqlite_path
from qflow.core.stored_text import stored_text
from qflow.search.database import open_storage, place_of

LONGEST = 512
"""Characters of an attribute's or parameter's name in Optuna's tables."""


def study_names(storage: str | Path) -> list[str]:
    """Return the names of the studies in a storage; none if there is no database yet, which is not created."""
    file = sqlite_path(place_of(storage)[0])
    if file is not None and not file.exists():
        return []
    return sorted(optuna.get_all_study_names(open_storage(place_of(storage)[0])))


def study_record(storage: str | Path, name: str) -> dict[str, Any]:
    """Return the study `name` as builtins that JSON holds.

    Raises TrackingError if it is missing or has a running trial.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if name not in study_names(storage):
        url = place_of(storage)[0]
        raise TrackingError(
            f"A study that was tuned is bundled with its Optuna study, but got none of {name} in "
            f"{sqlite_path(url) or masked(url)}. Name the folder or database that it was tuned in: root=<folder> or "
            "search.storage=<url>."
        )
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
    trials, directions = check_study(record)
    opened = open_storage(place_of(storage)[0])
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


def check_study(record: Mapping[str, Any]) -> tuple[list[optuna.trial.FrozenTrial], list[StudyDirection]]:
    """Return the trials and directions of a record. Raises BundleError if it is not as `study_record` returned it."""
    try:
        _check_attributes(record["user_attrs"])
        trials, directions = [_made(t) for t in record["trials"]], [StudyDirection[d] for d in record["directions"]]
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        text = " ".join(str(error).split())[:80]
        raise BundleError(f"A study in a bundle is one that qflow wrote, but got {text}. Bundle it again.") from error
    if not directions:
        raise BundleError("A study in a bundle has a direction, but got none. Bundle it again.")
    return trials, directions


def withdraw_study(storage: str | Path, name: str, runs: Collection[str]) -> None:
    """Delete the study that an import of these runs has made, if it has; a study of other runs stays."""
    if name in study_names(storage):
        opened = open_storage(place_of(storage)[0])
        text = json.dumps([_trial(t) for t in optuna.load_study(study_name=name, storage=opened).get_trials()])
        if any(run in text for run in runs):
            optuna.delete_study(study_name=name, storage=opened)


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


def _check_attributes(values: Mapping[str, Any]) -> None:
    for key in values:
        if not 1 <= len(key) <= LONGEST:
            raise ValueError(f"an attribute's name of {len(key)} characters")
    text = json.dumps(dict(values), ensure_ascii=False, allow_nan=False)
    if stored_text(text) != text or "\\u0000" in text:
        raise ValueError("an attribute that is no UTF-8")


def _made(record: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    if record["state"] == "RUNNING":
        raise ValueError("a trial that runs")
    for value in record["values"] or ():
        if type(value) not in (int, float) or not math.isfinite(float(value)):
            raise ValueError(f"the value {value!a:.20}")
    for attributes in (record["params"], record["user_attrs"], record["system_attrs"]):
        _check_attributes(attributes)
    return create_trial(
        state=TrialState[record["state"]],
        values=record["values"],
        params=record["params"],
        distributions={k: json_to_distribution(json.dumps(d)) for k, d in record["distributions"].items()},
        user_attrs=record["user_attrs"],
        system_attrs=record["system_attrs"],
    )
