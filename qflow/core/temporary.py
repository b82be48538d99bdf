"""Temporary folders that go with their process: what a killed process has left, the next one removes.

A process holds a lock on each of its folders, which the kernel frees when the process ends in any way. A folder that
nobody holds was left over.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

PREFIX = ".qflow-"


class TemporaryFolder(tempfile.TemporaryDirectory[str]):
    """A new folder in `place`, by default the folder of the system; it is removed with its block or its process.

    The first one that a process makes in a place removes those that killed processes have left there.
    """

    def __init__(self, place: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if place is None else place
        _tidy(place)
        super().__init__(prefix=PREFIX, dir=place)
        weakref.finalize(self, os.close, _held(self.name))


def folder_of(owner: object) -> Path:
    """Make a folder that goes with an object or with this process; a copy of either in a forked one leaves it alone."""
    path, number = held_folder()
    weakref.finalize(owner, _remove, path, number, os.getpid())
    return path


def held_folder() -> tuple[Path, int]:
    """Make a folder in that of the system; return it with the number of its lock, and leave its end to the caller."""
    place = Path(tempfile.gettempdir())
    _tidy(place)
    path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
    return Path(path), _held(path)


def _remove(path: Path, number: int, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(path, ignore_errors=True)
    os.close(number)


@cache
def _tidy(place: Path) -> None:
    for path in left_over(place):
        shutil.rmtree(path, ignore_errors=True)


def left_over(place: Path) -> Iterator[Path]:
    """Yield the temporary folders of this user in `place` that no process holds."""
    for path in sorted(place.glob(f"{PREFIX}*")):
        try:
            number = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # of another user, or removed meanwhile
            continue
        with suppress(OSError):  # held, or on a file system that locks no folders
            if os.fstat(number).st_uid == os.geteuid():
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield path
        os.close(number)


def _held(path: str) -> int:
    """Return the number of the open folder, which is locked. It is made again if it was taken for left over."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        with suppress(FileNotFoundError):
            number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system that locks no folders
                fcntl.flock(number, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), os.stat(path)):
                    return number
            os.close(number)
