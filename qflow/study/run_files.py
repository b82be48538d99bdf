"""The files of runs in the store, fetched by name as JSON, configuration, records and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from qflow.bundle.bounded import read_config, read_json
from qflow.config.settings import load_resolved
from qflow.core.errors import TrackingError
from qflow.core.record import from_dict
from qflow.report.files import SCORES
from qflow.tracking.artifacts import Store
from qflow.tracking.mlflow_tracker import MlflowTracker

T = TypeVar("T")


class RunFiles:
    """Files of runs by name; None for one that a run does not have. A run's address is asked for once, not by file."""

    def __init__(self, tracker: MlflowTracker, folder: Path) -> None:
        self._tracker, self._folder = tracker, folder
        self._store = Store(tracker.client, tracker.uri, tracker.patience)
        self._addresses: dict[str, str] = {}

    def fetch(self, run: str, name: str) -> Path | None:
        into = self._folder / run
        into.mkdir(parents=True, exist_ok=True)
        try:
            with self._tracker.calling():
                address = self._addresses.get(run) or self._addresses.setdefault(run, self._store.run(run)[2])
                self._store.download(address, [name], into)
        except (TrackingError, OSError):  # a local store raises the second for a file that is absent
            return None
        return into / name

    def config(self, run: str) -> DictConfig:
        return read_config(self._folder / run) if self.fetch(run, "config.yaml") else load_resolved("")

    def json(self, run: str, name: str) -> Any:
        path = self.fetch(run, name)
        return read_json(path.parent, path.name) if path else None

    def scores(self, run: str) -> Sequence[float]:
        """Score of each evaluation sample, of a trial on its run and of the float model on the study's; or nothing."""
        return self.json(run, SCORES) or ()

    def record(self, run: str, name: str, kind: type[T]) -> T | None:
        data = self.json(run, name)
        return from_dict(kind, data) if data else None

    def rows(self, run: str, name: str) -> list[dict[str, Any]] | None:
        """Rows of a table in pandas' "split" layout."""
        data = self.json(run, name)
        return [dict(zip(data["columns"], row, strict=True)) for row in data["data"]] if data else None

    def table(self, run: str, name: str, kind: type[T]) -> list[T] | None:
        rows = self.rows(run, name)
        return None if rows is None else [from_dict(kind, row) for row in rows]
