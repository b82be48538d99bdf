"""From an address to an MLflow client and an experiment: which stores are served, refusals in one line."""

from __future__ import annotations

import getpass
import http.client
import logging
import os
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qflow.core.errors import TrackingError
from qflow.core.store import build_aside, sqlite_path, sqlite_url

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMA = "1"  # of the tags, params and files in a store; another number is another meaning
ANSWER_SECONDS = 4.0  # a server that needs longer to say "OK" is down or unreachable
_FOREIGN = ("mlflow", "sqlalchemy", "alembic", "sqlite3", "requests", "urllib3")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def open_client(uri: str | None, folder: Path, experiment: str) -> tuple[MlflowClient, str, str]:
    """(client, uri, experiment id) of a store; without a `uri` the SQLite store in `folder`.

    Raises TrackingError when the store cannot be served or does not answer.
    """
    uri = uri or sqlite_url(folder / "mlflow.db")
    scheme = uri.partition(":")[0].partition("+")[0] if "://" in uri else "file"
    artifacts: str | None = str((folder / "artifacts").absolute())
    if scheme in ("http", "https"):
        _require_answer(uri)
        artifacts = None  # the server knows where
    elif scheme not in DATABASES:
        raise TrackingError(
            f"Runs are kept in a database or on a server, but got {uri}: MLflow has retired the file "
            f"store. Leave tracking.uri empty, or name sqlite:///FILE or http://HOST:PORT."
        )
    _quiet_import()
    from mlflow import MlflowClient

    with plain_errors(uri):
        if file := sqlite_path(uri):
            uri = sqlite_url(file)  # absolute: it must hold from any working folder
            build_aside(file, _create_database)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        return client, uri, _experiment(client, experiment, artifacts)


def _quiet_import() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow  # noqa: F401  # sets up its loggers, which are toned down below

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # a database error is raised as well as logged, and the log holds a traceback of 60 lines
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def _require_answer(uri: str) -> None:
    """Raise TrackingError unless the server answers in time, with name resolution, which has no timeout."""
    verdict = ["no answer"]
    thread = threading.Thread(target=lambda: verdict.append(_health(uri)), daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS + 0.5)
    if verdict[-1]:
        raise TrackingError(
            f"The tracking server must answer within {ANSWER_SECONDS:.0f} s, but got '{verdict[-1]}' "
            f"from {uri}. Start it (mlflow server), mend tracking.uri, or leave it empty for a local store."
        )


def _health(uri: str) -> str:
    """What is wrong with the server, or nothing."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_SECONDS) as answer:
            answer.read(64)
    except urllib.error.HTTPError as error:
        # 401 and 404: it answers; a proxy may hide /health, and MLflow itself says who may come in
        return "" if error.code in (401, 404) else f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def _create_database(url: str) -> None:
    """Run MLflow's migrations on a new file and close it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file = sqlite_path(url)
    assert file is not None
    store = SqlAlchemyStore(url, str(file.parent / "artifacts"))  # type: ignore[no-untyped-call]
    store.engine.dispose()
    engines = getattr(SqlAlchemyStore, "_engine_map", {})  # MLflow keeps engines by URL; this URL is gone soon
    engines.pop(url, None)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """The id of the experiment, made when missing. Raises TrackingError for one of another schema."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        tags = {"qflow.schema": SCHEMA, "mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"Runs go to an active experiment, but got the deleted '{name}'. Restore it or name another one."
        )
    schema = found.tags.get("qflow.schema")
    if schema is None:
        client.set_experiment_tag(found.experiment_id, "qflow.schema", SCHEMA)
    elif schema != SCHEMA:
        raise TrackingError(
            f"This qflow reads stores of schema {SCHEMA}, but got schema {schema} for experiment '{name}'. "
            f"Name another experiment or folder, or use the qflow that wrote it."
        )
    return str(found.experiment_id)


@contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow and its drivers raise into a TrackingError of one line."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _FOREIGN:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TrackingError(
            f"The tracking store must do what it is asked, but got '{lines[0]}' from {uri}. Mend "
            f"the store and run the same command again: what is finished is kept."
        ) from error


def source_tags() -> dict[str, str]:
    """Who ran what: the tags that MLflow's own client would not set for us."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a user database
        user = "unknown"
    tags = {"mlflow.user": user, "mlflow.source.name": "qflow", "mlflow.source.type": "LOCAL"}
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=2, check=False)
        commit = git.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {**tags, "mlflow.source.git.commit": commit} if commit else tags


def delete_artifacts(uri: str) -> None:
    """Remove everything under a run's artifact address. Raises TrackingError where its store does not delete."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(uri).delete_artifacts()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise TrackingError(
            f"An analysis replaces the files of the one before, but got a store that deletes none: {uri}. Delete the "
            "run, or name another tracking.experiment."
        ) from error
