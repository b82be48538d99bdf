"""The schema of `tracking`: the store of a command, and what it writes there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qflow.core.limits import AtLeast


@dataclass(kw_only=True)
class TrackingSchema:
    """Where runs go."""

    uri: str | None = None
    """MLflow tracking URI; null for a local store in `root`."""
    experiment: str = "${task.name}"
    """MLflow experiment of the study."""
    registered_model: str = "${task.name}"
    """Name of the registered model that `promote` gives versions to."""
    alias: str = "champion"
    """Alias in the registry that `promote` moves."""
    patience: Annotated[float, AtLeast(0.0)] = 600.0
    """Seconds to wait for a store that goes away while the command runs; 0 does not wait."""


@dataclass(kw_only=True)
class StoreSchema:
    """The store that runs and model versions are read from."""

    uri: str | None = None
    """MLflow tracking URI; null for a local store in `root`."""
    patience: Annotated[float, AtLeast(0.0)] = 600.0
    """Seconds to wait for a store that goes away while the command runs; 0 does not wait."""


@dataclass(kw_only=True)
class PromoteTrackingSchema:
    """Where the study is looked for, and what is registered."""

    uri: str | None = None
    """MLflow tracking URI; null for the local store in `root`."""
    experiment: str | None = None
    """null looks in all experiments."""
    registered_model: str | None = None
    """null takes the name of the task; one that only the run states is refused."""
    alias: str | None = None
    """null takes champion; one that only the run states is refused."""
    patience: Annotated[float, AtLeast(0.0)] = 600.0
    """Seconds to wait for a store that goes away while the command runs; 0 does not wait."""


@dataclass(kw_only=True)
class ReportTrackingSchema:
    """Where the study is looked for."""

    uri: str | None = None
    """MLflow tracking URI; null for the local store in `root`."""
    experiment: str | None = None
    """null looks in all experiments."""
    patience: Annotated[float, AtLeast(0.0)] = 600.0
    """Seconds to wait for a store that goes away while the command runs; 0 does not wait."""
