"""The Optuna storage of a study: a database file, a folder, or a server."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.study import StudyDirection

from qflow.core.credentials import masked
from qflow.core.errors import TrackingError
from qflow.core.installed import missing_driver
from qflow.core.store import build_aside, sqlite_path, sqlite_url

LOCK_TIMEOUT = 60  # seconds that a statement waits while another process writes


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
    except Exception as error:  # SQLAlchemy and its drivers have no common base class
        why = error.__cause__ or error  # Optuna says no more than that a commit failed
        raise TrackingError(
            missing_driver(error)
            or f"The study database must open, but got {type(why).__name__} for {masked(url)}: "
            f"{masked(str(why).splitlines()[0])}. Repair it or name another storage."
        ) from error


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """Open the database at `url`. A SQLite file that is missing is created completely or not at all."""
    file = sqlite_path(url)
    if file is None:
        return optuna.storages.RDBStorage(url)
    build_aside(file, _create)
    return optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT}})


def _create(url: str) -> None:
    storage = optuna.storages.RDBStorage(url)
    storage.remove_session()
    storage.engine.dispose()
