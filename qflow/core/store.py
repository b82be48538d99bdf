"""Opening stores on disk so that a kill at any moment leaves them usable; standard library only.

Creating a database is a long chain of migrations, and one killed in the middle can never be opened again. So
a database is built beside its place, under a lock, and renamed into it when it is whole: it is either absent
or complete. It is put in write-ahead mode once (a property of the file), which network file systems do not
support.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from qflow.core.errors import TrackingError

SQLITE = "sqlite:///"


def sqlite_url(path: Path) -> str:
    """The SQLAlchemy URL of a database file, absolute, so that it holds from any working folder."""
    return f"{SQLITE}{path.absolute()}"


def sqlite_path(url: str) -> Path | None:
    """The file of a SQLite URL, absolute; None for another kind of store."""
    if not url.startswith(SQLITE):
        return None
    return Path(url[len(SQLITE) :].partition("?")[0]).absolute()


@contextmanager
def exclusive(path: Path, *, owner_of: str = "") -> Iterator[None]:
    """Hold the lock file `path` while inside; its text is the holder's process id.

    With `owner_of` (what the lock guards) a second holder is refused with TrackingError, else it waits. The
    kernel frees the lock when the process ends, however it ends; the file itself stays, because removing it
    would let two processes hold two files of one name.
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


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, whenever this process is killed, finds the old or the new text whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def build_aside(path: Path, create: Callable[[str], None]) -> None:
    """Make the SQLite database `path` whole or not at all: `create(url)` builds it under another name.

    Does nothing when the file exists. Two processes that start at once build it once. `create` must close
    every connection it opened. Raises whatever `create` raises, and leaves nothing in the place of `path`.
    """
    if path.exists():
        return
    with exclusive(path.with_name(f".{path.name}.lock")):
        if path.exists():
            return
        for leftover in path.parent.glob(f"{path.name}.init-*"):
            leftover.unlink()  # of a builder that was killed: we hold its lock
        aside = path.with_name(f"{path.name}.init-{os.getpid()}")
        create(sqlite_url(aside))
        with closing(sqlite3.connect(aside)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(aside, path)
