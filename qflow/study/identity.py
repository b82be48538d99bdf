"""Which study a start continues: its run in the tracking store, its search in Optuna, and its settings are one."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from qflow.core.credentials import masked
from qflow.core.errors import ConfigError, TrackingError
from qflow.core.store import sqlite_path
from qflow.search.database import place_of
from qflow.search.study import IDENTITY, Study
from qflow.study.fingerprint import changes, known_state, settings_state
from qflow.tracking.lease import require_free
from qflow.tracking.mlflow_tracker import MlflowTracker

HOME = "qflow.home"
"""Tag of a study's run: the host and the folder of the search that it belongs to."""


def foresee(name: str, tracker: MlflowTracker, root: Path, storage: str | None) -> None:
    """Refuse a start before a file is made in its folder for the search; it is judged again once it owns the study.

    Raises TrackingError if the study has a living owner, or was begun in another search while there is none here yet.
    """
    tags = _tags(tracker, name)
    require_free(name, tags)
    file = sqlite_path(place_of(storage or root)[0])
    if file is not None and not file.exists():
        _require_home(name, tags, "", root)


def foresee_settings(study: Study, tracker: MlflowTracker, root: Path, config: DictConfig) -> None:
    """Refuse a start by what the search and the configuration say, before anything is computed and kept for it.

    Raises as `require_same`, which looks at the whole fingerprint once this process owns the study.
    """
    study.require_same(tracker.find_study(study.name))
    tags = _tags(tracker, study.name)
    _require_home(study.name, tags, study.identity, root)
    known = known_state(tags.get("qflow.fingerprint", ""))
    _require_settings(study, tags, {**known, **settings_state(config)})


def require_same(study: Study, tracker: MlflowTracker, root: Path, state: Mapping[str, str]) -> None:
    """Check a start before it writes anything; the caller owns the study and has reconciled its trials.

    Raises TrackingError if the runs are missing, or belong to the search of another folder, ConfigError if the study
    has trials of other settings than `state` (fingerprint.py).
    """
    name, tags = study.name, _tags(tracker, study.name)
    finished = sum(trial.state == "complete" for trial in study.trials())
    if finished and "qflow.fingerprint" not in tags:
        raise TrackingError(
            f"A study's runs are in its tracking store, but {name} has {finished} finished trials and "
            f"no run in {masked(tracker.uri)}. Restore the store, or use another name: study={name}-2."
        )
    _require_home(name, tags, study.identity, root)
    _require_settings(study, tags, state)


def _tags(tracker: MlflowTracker, name: str) -> dict[str, str]:
    run = tracker.find_study(name)
    return tracker.run_tags(run) if run else {}


def _require_home(name: str, tags: Mapping[str, str], identity: str, root: Path) -> None:
    if tags.get(IDENTITY, identity) != identity:
        raise TrackingError(
            f"A study is continued from the folder that holds its search, but got {name} of {tags.get(HOME)} in the "
            f"folder {root}. Start it there, name the search.storage of both, or use another name: study={name}-2."
        )


def _require_settings(study: Study, tags: Mapping[str, str], state: Mapping[str, str]) -> None:
    changed = changes(tags["qflow.fingerprint"], state) if "qflow.fingerprint" in tags else []
    if changed and any(trial.state == "complete" for trial in study.trials()):
        raise ConfigError(
            f"A study keeps the settings that it began with, but got others for {study.name}: "
            f"{', '.join(changed[:4])}. Use another name: study={study.name}-2."
        )


def identity_tags(study: Study, root: Path) -> dict[str, str]:
    """Return the tags of the study's run by which another start recognises it."""
    study.identify()
    return {IDENTITY: study.identity, HOME: home(root)}


def home(root: Path) -> str:
    """Return what names a folder of this host."""
    return f"{socket.gethostname()}:{root}"
