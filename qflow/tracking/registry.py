"""The model registry: numbered versions of a qconfig, and the alias that marks the promoted one.

A version points at the artifacts of the run that it came from; nothing is copied. Moving the alias promotes a version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    from qflow.tracking.mlflow_tracker import MlflowTracker


def register(
    tracker: MlflowTracker, name: str, run_id: str, artifact_path: str, alias: str,
    tags: Mapping[str, str], description: str,
) -> int:  # fmt: skip
    """Create a version of model `name` from a run's artifact folder, point `alias` at it, and return its number.

    If the run is a version of `name` already, only the alias moves. A kill between the two steps leaves a version
    without the alias, which still points at the old version. Raises ConfigError for an alias that MLflow reserves,
    TrackingError if the store fails.
    """
    check_alias(alias)
    with tracker.calling() as client:
        client.get_run(run_id)  # MLflow would register a version of a run that does not exist
        _create_model(tracker, name)
        source = f"runs:/{run_id}/{artifact_path}"
        known = [v for v in client.search_model_versions(f"run_id = '{run_id}'") if v.name == name]
        made = next((v for v in known if v.source == source), None) or client.create_model_version(
            name, source=source, run_id=run_id, tags=dict(tags), description=description
        )
        version = int(made.version)  # text over HTTP
        client.set_registered_model_alias(name, alias, str(version))
    return version


def champion(tracker: MlflowTracker, name: str, alias: str) -> tuple[int, str] | None:
    """Return the (version, run id) that `alias` points at, or None if model or alias do not exist."""
    check_alias(alias)
    from mlflow.exceptions import MlflowException

    with tracker.calling() as client:
        try:
            found = client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None  # the second is for a missing alias of a model that exists
            raise
    return int(found.version), str(found.run_id)


def check_alias(alias: str) -> None:
    """Raise ConfigError for an alias that MLflow does not allow."""
    if not re.fullmatch(r"[\w-]{1,255}", alias):
        raise ConfigError(f"An alias is letters, digits, _ and -, but got {alias!r}. Rename it.")
    if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE):
        raise ConfigError(
            f"An alias is a name that MLflow does not reserve (latest, v1, v2, ...), but got "
            f"{alias!r}. Take another, such as champion."
        )


def _create_model(tracker: MlflowTracker, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        tracker.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
