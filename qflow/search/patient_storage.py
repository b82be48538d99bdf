"""An Optuna storage on a server whose calls wait while the server is away, as those of the tracking store do.

A call whose answer was lost may have reached the database. Most have the same effect twice. The two that have not look
first what has become of the lost call, which tells it apart because one process at a time writes to a study.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import optuna
from optuna.trial import TrialState

Call: TypeAlias = Callable[[Callable[[], Any], Callable[[], Any]], Any]
"""Repeats a call while the store is away; the second argument returns the result of a lost one, or None."""
PLAIN = (
    "set_study_user_attr", "set_study_system_attr", "get_study_user_attrs", "get_study_system_attrs",
    "get_study_directions", "get_study_name_from_id", "get_trial", "_get_trials", "set_trial_user_attr",
    "set_trial_system_attr", "_set_trial_param", "get_trial_id_from_study_id_trial_number",
)  # fmt: skip
"""Methods of Optuna's storage that may be repeated as they are."""


def make_patient(study: optuna.Study, call: Call) -> None:
    """Let each call of the study's storage go through `call`."""
    storage: Any = getattr(study._storage, "_backend", study._storage)  # below Optuna's cache of trials
    for name in PLAIN:
        if method := getattr(storage, name, None):
            setattr(storage, name, partial(_patient, call, method))
    create, end = storage._create_new_trial, storage.set_trial_state_values

    def create_new_trial(study_id: int, *arguments: Any, **terms: Any) -> Any:
        known = {trial.number for trial in storage.get_all_trials(study_id, deepcopy=False)}

        def made() -> Any:
            found = storage.get_all_trials(study_id, deepcopy=False)
            return next((trial for trial in found if trial.number not in known), None)

        return call(partial(create, study_id, *arguments, **terms), made)

    def set_trial_state_values(trial_id: int, state: TrialState, values: Any = None) -> Any:
        def made() -> Any:
            return True if storage.get_trial(trial_id).state == state else None

        return call(partial(end, trial_id, state, values), made)

    storage._create_new_trial = create_new_trial
    storage.set_trial_state_values = set_trial_state_values


def _patient(call: Call, method: Callable[..., Any], *arguments: Any, **terms: Any) -> Any:
    return call(partial(method, *arguments, **terms), lambda: None)
