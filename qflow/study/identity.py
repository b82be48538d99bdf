"""Which study a start continues: its run in the tracking store, its search in Optuna, and its settings are one."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from qflow.core.credentials import masked
from qflow.core.errors import ConfigError, TrackingError
from qflow.search.study import IDENTITY, Study
from qflow.study.fingerprint import changes
from qflow.tracking.mlflow_tracker import MlflowTracker

HOME = "qflow.home"
"""Tag of a study's run: the host and the folder of the search that it belongs to."""


def require_same(study: Study, tracker: MlflowTracker, root: Path, state: Mapping[str, str]) -> None:
    """Check a start before it writes anything; the caller owns the study and has reconciled its trials.

    Raises TrackingError if the runs are missing, or belong to the search of another folder, ConfigError if the study
    has trials of other settings than `state` (fingerprint.py).
    """
    name, found = study.name, tracker.find_study(study.name)
    finished = sum(trial.state == "complete" for trial in study.trials())
    tags = tracker.run_tags(found) if found else {}
    if finished and "qflow.fingerprint" not in tags:
        raise TrackingError(
            f"A study's runs are in its tracking store, but {name} has {finished} finished trials and "
            f"no run in {masked(tracker.uri)}. Restore the store, or use another name: study={name}-2."
        )
    if tags.get(IDENTITY, study.identity) != study.identity:
        raise TrackingError(
            f"A study is continued from the folder that holds its search, but got {name} of {tags.get(HOME)} in the "
            f"folder {root}. Start it there, name the search.storage of both, or use another name: study={name}-2."
        )
    changed = changes(tags.get("qflow.fingerprint", ""), state) if found and finished else []
    if changed:
        raise ConfigError(
            f"A study keeps the settings that it began with, but got others for {name}: "
            f"{', '.join(changed[:4])}. Use another name: study={name}-2."
        )


def identity_tags(study: Study, root: Path) -> dict[str, str]:
    """Return the tags of the study's run by which another start recognises it."""
    study.identify()
    return {IDENTITY: study.identity, HOME: home(root)}


def home(root: Path) -> str:
    """Return what names a folder of this host."""
    return f"{socket.gethostname()}:{root}"
