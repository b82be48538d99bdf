"""The connection to MLflow: from an address to a client and an experiment, with errors in one line."""

from __future__ import annotations

import getpass
import http.client
import logging
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qflow.core.credentials import masked
from qflow.core.errors import TrackingError
from qflow.core.installed import missing_driver, no_driver
from qflow.core.store import build_aside, check_sqlite, sqlite_path, sqlite_url
from qflow.process.hanging import answered
from qflow.tracking.patience import Patience, Patient, leave_repeating_to_us

if TYPE_CHECKING:
    from mlflow import MlflowClient

SCHEMA = "1"  # version of the tags, params and files in a store
ANSWER_SECONDS = 4.0  # a server that takes longer to answer counts as down
_FOREIGN = ("mlflow", "sqlalchemy", "alembic", "sqlite3", "requests", "urllib3")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def open_client(
    uri: str | None, folder: Path, experiment: str, patience: Patience | None = None
) -> tuple[MlflowClient, str, str]:
    """Return (client, uri, experiment id) of the store at `uri`, by default the SQLite store in `folder`.

    Raises TrackingError if the store is of a kind that is not supported or does not answer.
    """
    client, uri = open_store(uri, folder, patience=patience)
    artifacts = None if uri.startswith("http") else _address(folder / "artifacts")  # a server chooses the place
    with plain_errors(uri):
        return client, uri, _experiment(client, experiment, artifacts)


def open_store(
    uri: str | None, folder: Path, create: bool = True, patience: Patience | None = None
) -> tuple[MlflowClient, str]:
    """Return (client, uri) of the store at `uri`, by default the SQLite store in `folder`; its calls have `patience`.

    Raises TrackingError as `open_client`, and for a missing database if it is not to be created. A store that does not
    answer now is not waited for, because its address is the likelier mistake.
    """
    uri = uri or sqlite_url(folder / "mlflow.db")
    scheme = uri.partition(":")[0].partition("+")[0] if "://" in uri else "file"
    if scheme not in ("http", "https", *DATABASES):
        raise TrackingError(
            f"Runs are kept in a database or on a server, but got {masked(uri)}: MLflow has retired the file "
            f"store. Leave tracking.uri empty, or name sqlite:///FILE or http://HOST:PORT."
        )
    check_sqlite(uri, "tracking.uri")
    if scheme in ("http", "https"):
        _require_answer(uri)
    _quiet_import()
    leave_repeating_to_us()
    from mlflow import MlflowClient

    with plain_errors(uri):
        if file := sqlite_path(uri):
            uri = sqlite_url(file)  # absolute, so that it is valid in any working folder
            if not create and not file.exists():
                raise TrackingError(f"A store that is read must exist, but got none at {file}. Name its uri or root.")
            if file.exists():
                _require_own(uri)
            build_aside(file, _create_database)
        elif scheme in DATABASES:
            _require_own(uri)
        client = Patient(MlflowClient(tracking_uri=uri, registry_uri=uri), uri, patience or Patience())
        return cast("MlflowClient", client), uri


def _quiet_import() -> None:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow  # noqa: F401  # sets up its loggers, whose levels are raised below

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("mlflow.store.db.utils", "psycopg", "sqlalchemy.pool"):  # tracebacks of what is raised too
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _require_answer(uri: str) -> None:
    """Raise TrackingError unless the server answers in time; name resolution, which has no timeout, is included."""
    try:
        wrong = answered(partial(_health, uri), ANSWER_SECONDS)
    except TimeoutError:
        wrong = "no answer"
    if wrong:
        raise TrackingError(
            f"The tracking server must answer within {ANSWER_SECONDS:.0f} s, but got '{wrong}' "
            f"from {masked(uri)}. Start it (mlflow server), correct tracking.uri, or leave it empty for a local store."
        )


def _require_own(uri: str) -> None:
    """Connect to a database once, as MLflow would try ten times in 100 s, without a word.

    Raises TrackingError if it does not answer, or holds the tables of another program, before MLflow adds its own.
    """
    from sqlalchemy import create_engine, inspect

    try:
        engine = create_engine(uri)
    except ModuleNotFoundError as error:
        raise TrackingError(no_driver(str(error.name))) from error
    except ValueError:  # its text may hold a part of the password
        raise TrackingError(
            f"The address of a database has a number as port, but got {masked(uri)}. Correct tracking.uri."
        ) from None
    try:
        tables = answered(lambda: set(inspect(engine).get_table_names()), ANSWER_SECONDS)
    except TimeoutError as error:
        raise TrackingError(
            f"The tracking store must answer within {ANSWER_SECONDS:.0f} s, but got no answer from {masked(uri)}. "
            "Start it, correct tracking.uri, or leave it empty for a local store."
        ) from error
    engine.dispose()
    if {"alembic_version", "studies"} & tables and "experiments" not in tables:
        whose = "a search" if "studies" in tables else "another program"
        raise TrackingError(
            f"A tracking store has a database of its own, but got one with the tables of {whose} at {masked(uri)}. "
            "Name another one, or leave tracking.uri empty for a local store."
        )


def _health(uri: str) -> str:
    """Return what is wrong with the server, or an empty text."""
    try:
        place = re.sub("://.*@", "://", uri.rstrip("/"))  # MLflow sends user and password, this request needs none
        with urllib.request.urlopen(f"{place}/health", timeout=ANSWER_SECONDS) as answer:
            answer.read(64)
    except urllib.error.HTTPError as error:
        # 401 and 404 count as an answer: a proxy may hide /health, and MLflow itself checks access
        return "" if error.code in (401, 404) else f"HTTP {error.code} {error.reason}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def _address(folder: Path) -> str:
    """Return the address of a local folder for MLflow: its path, or a file URI if the path holds URL characters."""
    path = folder.absolute()  # MLflow decodes %20 in a plain path too
    return str(path) if re.fullmatch(r"[\w/.\- ]*", str(path)) else path.as_uri()


def _create_database(url: str) -> None:
    """Create the database with MLflow's migrations, and close it."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    file = sqlite_path(url)
    assert file is not None
    store = SqlAlchemyStore(url, _address(file.parent / "artifacts"))  # type: ignore[no-untyped-call]
    store.engine.dispose()
    engines = getattr(SqlAlchemyStore, "_engine_map", {})  # MLflow caches engines by URL, and this file is renamed next
    engines.pop(url, None)


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment; create it if missing. Raises TrackingError for one of another schema."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        tags = {"qflow.schema": SCHEMA, "mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process has created it
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
    """Turn exceptions of MLflow and its drivers into a TrackingError of one line."""
    try:
        yield
    except Exception as error:
        if line := missing_driver(error):
            raise TrackingError(line) from error
        if type(error).__module__.partition(".")[0] not in _FOREIGN:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            raise TrackingError(
                f"What is asked of a store must exist there, but got '{masked(lines[0])}' from "
                f"{masked(uri)}. Name another run, model or alias."
            ) from error
        raise TrackingError(
            f"A call to the tracking store must succeed, but got '{masked(lines[0])}' from "
            f"{masked(uri)}. Repair "
            f"the store and run the same command again: finished trials are kept."
        ) from error


def source_tags() -> dict[str, str]:
    """Return the tags for user, source and commit, which MLflow's client does not set by itself."""
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
    """Delete everything under a run's artifact address. Raises TrackingError if the store cannot delete."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(uri).delete_artifacts()  # type: ignore[no-untyped-call]
    except NotImplementedError as error:
        raise TrackingError(
            f"An analysis replaces the files of the one before, but got a store that deletes none: {masked(uri)}. "
            "Delete the run, or name another tracking.experiment."
        ) from error
