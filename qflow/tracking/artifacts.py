"""Files of runs and model versions: their sizes before anything is fetched, and the download of those that are wanted.

On a local store, links, pipes and devices are refused before anything is opened.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qflow.core.errors import TrackingError
from qflow.core.names import shown_name
from qflow.tracking import connect
from qflow.tracking.limits import joined, runs_of
from qflow.tracking.patience import Patience, Patient

if TYPE_CHECKING:
    from mlflow import MlflowClient

MOST = 1000  # files of a run that are looked at


class Opened(Protocol):
    """A store: MlflowTracker, or Store."""

    client: MlflowClient

    def calling(self) -> AbstractContextManager[MlflowClient]:
        """Yield the client; MLflow's errors become one line."""


class Store:
    """A store that is read and not written: runs, their files, and versions of registered models."""

    def __init__(self, client: MlflowClient, uri: str, patience: Patience | None = None) -> None:
        self.client, self.uri, self.patience = client, uri, patience or Patience()

    @classmethod
    def open(cls, uri: str | None, folder: Path, patience: Patience | None = None) -> Store:
        """Open the store at `uri`, or the SQLite store in `folder`. Raises TrackingError, also if there is none."""
        patience = patience or Patience()
        return cls(*connect.open_store(uri, folder, create=False, patience=patience), patience)

    @contextmanager
    def calling(self) -> Iterator[MlflowClient]:
        """Yield the client, and turn MLflow's errors into one line."""
        with connect.plain_errors(self.uri):
            yield self.client

    def studies(self, name: str, experiment: str | None = None) -> dict[str, str]:
        """Return experiment -> run id of every study of this name, in all experiments or in the one that is named."""
        query = runs_of(name, "study")
        with self.calling() as client:
            names = {e.experiment_id: shown_name(str(e.name)) for e in client.search_experiments()}
            places = [key for key, value in names.items() if experiment in (None, value)]
            runs = client.search_runs(places, query) if places else []
        return {names[run.info.experiment_id]: str(run.info.run_id) for run in reversed(runs)}

    def all_studies(self) -> dict[str, tuple[str, str]]:
        """Return run id -> (name, experiment id) of every study in the store."""
        with self.calling() as client:
            places = [e.experiment_id for e in client.search_experiments()]
            runs = client.search_runs(places, "tags.`qflow.kind` = 'study'") if places else []
        return {str(r.info.run_id): (shown_name(r.data.tags["qflow.study"]), str(r.info.experiment_id)) for r in runs}

    def run(self, run_id: str) -> tuple[dict[str, str], dict[str, float], str]:
        """Return tags, metrics and artifact address of a run. Raises TrackingError for one that does not exist."""
        with connect.plain_errors(self.uri):
            run = self.client.get_run(run_id)
        return joined(run.data.tags), dict(run.data.metrics), str(run.info.artifact_uri)

    def version(self, name: str, version: str = "", alias: str = "") -> tuple[int, dict[str, str], str]:
        """Return number, tags and artifact address of a model version, by its number or by an alias."""
        with connect.plain_errors(self.uri):
            client = self.client
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
            place = client.get_model_version_download_uri(name, found.version)
        return int(found.version), dict(found.tags), str(place)

    def sizes(self, address: str, below: str = "") -> dict[str, int]:
        """Return the size in bytes of every file below an artifact address, or below a folder of it, by its path.

        Raises TrackingError for a link, pipe or device, or for too many files.
        """
        found: dict[str, int] = {}
        with connect.plain_errors(self.uri):
            repository = self._repository(address)
            _refuse_special(getattr(repository, "artifact_dir", ""))
            left = [below]
            while left:
                for entry in repository.list_artifacts(left.pop() or None):
                    left += [entry.path] if entry.is_dir else []
                    found |= {} if entry.is_dir else {entry.path: int(entry.file_size or 0)}
                    if len(found) + len(left) > MOST:
                        raise TrackingError(f"A run or model has at most {MOST} files, but got more at {address}.")
        return found

    def download(self, address: str, names: Iterable[str], into: Path) -> None:
        """Fetch files below an artifact address into a local folder, under their paths."""
        with connect.plain_errors(self.uri):
            repository = self._repository(address)
            for name in names:
                repository.download_artifacts(name, str(into))

    def _repository(self, address: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        found = get_artifact_repository(address, tracking_uri=self.uri, registry_uri=self.uri)  # type: ignore[no-untyped-call]
        return Patient(found, self.uri, self.patience)


def _refuse_special(folder: str) -> None:
    for path in Path(folder).rglob("*") if folder else ():
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise TrackingError(
                f"Files of a run are plain files, but got a link, pipe or device at {path}. Take another run."
            )
