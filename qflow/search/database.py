"""The Optuna storage of a study: a database file, a folder, or a server."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.study import StudyDirection
from sqlalchemy import create_engine, inspect

from qflow.core.credentials import masked
from qflow.core.errors import QflowError, TrackingError
from qflow.core.installed import missing_driver, no_driver
from qflow.core.store import build_aside, check_sqlite, sqlite_path, sqlite_url
from qflow.process.hanging import answered

LOCK_TIMEOUT = 60  # seconds that a statement waits while another process writes
ANSWER_SECONDS = 4.0  # a server that takes longer for its first answer counts as down
OWN = "studies"  # a table of Optuna
FOREIGN = "experiments"  # a table of MLflow
SHARED = {"trials", "alembic_version", FOREIGN}
"""Tables that Optuna has too, or whose owner has no room for it: the one of alembic holds one program's version."""


def place_of(storage: str | Path) -> tuple[str, Path]:
    """Return the URL of the database and the folder for lock files (the temporary folder for a server)."""
    text = str(storage)
    if "://" in text:
        file = sqlite_path(text)
        return text, file.parent if file else Path(tempfile.gettempdir())
    path = Path(storage).absolute()
    file = path if path.suffix and not path.is_dir() else path / "optuna.db"  # a folder's name may hold a dot
    return sqlite_url(file), file.parent


def open_study(url: str, name: str, directions: Sequence[str]) -> optuna.Study:
    """Open or create a study in the database at `url`. Raises TrackingError if the database cannot be opened."""
    try:
        return optuna.create_study(
            storage=open_storage(url),
            study_name=name,
            directions=[StudyDirection[direction.upper()] for direction in directions],
            load_if_exists=True,
        )
    except QflowError:
        raise
    except Exception as error:  # SQLAlchemy and its drivers have no common base class
        why = error.__cause__ or error  # Optuna says no more than that a commit failed
        raise TrackingError(
            missing_driver(error)
            or f"The study database must open, but got {type(why).__name__} for {masked(url)}: "
            f"{masked(str(why).splitlines()[0])}. Repair it or name another storage."
        ) from error


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Open the database at `url`. A SQLite file that is missing is created completely or not at all.

    Raises TrackingError, before anything is written, if it does not answer or holds the tables of another program.
    """
    check_sqlite(url, "search.storage")
    file = sqlite_path(url)
    if file is None or file.exists():
        _require_own(url)
    if file is None:
        return optuna.storages.RDBStorage(url)
    build_aside(file, _create)
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT}})


def _require_own(url: str) -> None:
    try:
        engine = create_engine(url)
    except ModuleNotFoundError as error:
        raise TrackingError(no_driver(str(error.name))) from error
    try:
        tables = answered(lambda: set(inspect(engine).get_table_names()), ANSWER_SECONDS)
    except TimeoutError as error:
        raise TrackingError(
            f"The database of a search must answer within {ANSWER_SECONDS:.0f} s, but got no answer from "
            f"{masked(url)}. Start it, or correct search.storage."
        ) from error
    engine.dispose()
    if tables & SHARED and (OWN not in tables or FOREIGN in tables):
        whose = "MLflow" if FOREIGN in tables else "another program"
        raise TrackingError(
            f"A search has a database of its own, but got one with the tables of {whose} at {masked(url)}. "
            "Name another one: search.storage=<url>."
        )


def _create(url: str) -> None:
    storage = optuna.storages.RDBStorage(url)
    storage.remove_session()
    storage.engine.dispose()
