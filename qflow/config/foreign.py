"""Exceptions of the system and of libraries as one line each: the one place where they become qflow's.

A full disk, a closed folder or a broken store is nothing that qflow can mend, and its traceback helps nobody. What is
not in here is a defect of qflow or of the user's code, and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from qflow.core.installed import missing_driver

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_TEXTS = ("No space left on device", "database or disk is full", "Disk quota exceeded", "File too large")
"""How libraries say it that do not raise an OSError: SQLite, safetensors, MLflow."""
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
OTHER_KIND = (errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EEXIST)
STORES = ("mlflow", "sqlalchemy", "alembic", "sqlite3", "optuna", "requests", "urllib3")
"""Libraries whose own exceptions say that a store does not do what it should."""
AGAIN = "run the same command again: finished trials are kept"


def foreign_line(error: BaseException) -> str:
    """Return the line for an exception of the system or of a store; "" for any other, which is a defect."""
    chain = list(_causes(error))
    if any(getattr(e, "errno", None) in FULL or any(text in str(e) for text in FULL_TEXTS) for e in chain):
        return f"Results need room on the disk, but got '{_shown(error)}'. Free some, and {AGAIN}."
    for e in chain:
        if isinstance(e, OSError) and e.errno in CLOSED:
            return f"Folders of a command are open to it, but got '{_shown(e)}'. Open it, or name another."
        if isinstance(e, OSError) and e.errno in OTHER_KIND:
            return f"A path of a command is a file or a folder as it says, but got '{_shown(e)}'. Name another."
        if line := missing_driver(e):
            return line
    if type(error).__module__.partition(".")[0] in STORES:
        return f"A call to a store must succeed, but got '{_shown(error)}'. Repair the store, and {AGAIN}."
    if isinstance(error, MemoryError):
        return (
            f"A command needs memory, but got none left. Lower task.batch_size or sensitivity.memory_mb, and {AGAIN}."
        )
    if isinstance(error, UnicodeDecodeError):
        return f"Text is in UTF-8, but got '{_shown(error)}'. QFLOW_DEBUG=1 shows which file."
    if isinstance(error, RecursionError):
        return f"Values are nested a few levels deep, but got '{_shown(error)}'. QFLOW_DEBUG=1 shows where."
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _shown(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" for {error.filename}" if error.filename else "")
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
