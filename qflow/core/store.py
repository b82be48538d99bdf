"""Files and databases on disk that stay usable if the process is killed at any moment; standard library only.

Creating a database takes many migrations, and one killed in the middle can never be opened again. Therefore a database
is built under another name, under a lock, and renamed when it is complete. It is set to write-ahead mode once (a
property of the file), which network file systems do not support.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from urllib.parse import unquote

from qflow.core.credentials import masked
from qflow.core.errors import TrackingError
from qflow.core.temporary import TemporaryFolder

SQLITE = "sqlite:///"
SQLITE_QUOTED = "sqlite+pysqlite:///"
"""The same store with its driver named. MLflow makes a folder by the text that follows `sqlite:///`, without decoding
it, so a path with escapes is written in this form."""


def sqlite_url(path: Path) -> str:
    """Return the SQLAlchemy URL of a database file, absolute, so that it is valid in any working folder.

    Escaped are the characters that SQLAlchemy reads as part of a URL (`%`, `?`), that Optuna fills in (`{`, `}`), and
    control characters, which would break a printed line. Raises TrackingError for such a path under a SQLAlchemy before
    2.1, the only one for Python 3.10, which does not decode it.
    """
    text = str(path.absolute())
    quoted = re.sub(r"[%?{}\x00-\x1f\x7f]", lambda found: f"%{ord(found[0]):02X}", text)
    if quoted != text and tuple(map(int, version("sqlalchemy").split(".")[:2])) < (2, 1):
        raise TrackingError(
            "Under Python 3.10 the path of a store has no %, ?, {, } or control characters, but got "
            f"{text!a}. Rename the folder, or use Python 3.11."
        )
    return f"{SQLITE}{text}" if quoted == text else f"{SQLITE_QUOTED}{quoted}"


def check_sqlite(url: str, key: str) -> None:
    """Raise TrackingError for a SQLite URL that names no file, or goes through another driver than Python's own."""
    if not url.startswith("sqlite"):
        return
    file = sqlite_path(url)
    if file is None or not file.name or file.name.startswith(":memory:") or file.is_dir():
        raise TrackingError(
            f"A SQLite store is a file, as in sqlite:///FILE, but got {masked(url)}. Name one: {key}=sqlite:///mine.db."
        )


def sqlite_path(url: str) -> Path | None:
    """Return the absolute path of a SQLite URL; None for another kind of store."""
    scheme = next((s for s in (SQLITE, SQLITE_QUOTED) if url.startswith(s)), None)
    if scheme is None:
        return None
    return Path(unquote(url.removeprefix(scheme).partition("?")[0])).absolute()


@contextmanager
def exclusive(path: Path, *, owner_of: str = "") -> Iterator[None]:
    """Hold the lock file `path` inside the block; the file contains the process id of the holder.

    With `owner_of` (the name of what the lock guards) a second process gets a TrackingError, else it waits. The kernel
    frees the lock when the process ends in any way. The file stays, because after its removal two processes could lock
    two files of the same name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if owner_of else 0))
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise TrackingError(
                f"One process at a time drives {owner_of}, but got a second one while process {holder} does. "
                f"Wait for it or end it; the study then continues."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield where to write what will be the file `path`: it takes that place, complete, when the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFolder(path.parent) as folder:
        aside = Path(folder) / path.name
        yield aside
        os.replace(aside, path)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that readers find either the old or the new text complete, even after a kill or a power failure.

    Nothing is left beside it where the disk is full. Raises OSError.
    """
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the renamed file may be empty after a power failure
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def build_aside(path: Path, create: Callable[[str], None]) -> None:
    """Create the SQLite database `path` completely or not at all: `create(url)` builds it under another name.

    Nothing happens if the file exists. Two processes that start at once build it once. `create` must close every
    connection that it opens. An exception of `create` propagates, and no file is left at `path`.
    """
    if path.exists():
        return
    with exclusive(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for file in path.parent.iterdir():
            if file.name.startswith(f"{path.name}.init-"):
                file.unlink()  # of a process that was killed, since we hold the lock
        aside = path.with_name(f"{path.name}.init-{os.getpid()}")
        create(sqlite_url(aside))
        with closing(sqlite3.connect(aside)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(aside, path)
