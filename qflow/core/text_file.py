"""Text files that users name: read whole, or refused in one line before a pipe blocks or memory runs short."""

from __future__ import annotations

import stat
from pathlib import Path

from qflow.core.errors import ConfigError

LARGEST = 64 * 2**20  # bytes; a device file has 5 kB, a profile of a large network 10 MB


def read_text(path: Path, rule: str, most: int = LARGEST) -> str:
    """Return the text of a file, without the mark of its byte order.

    Raises ConfigError, which begins with `rule` (`A profile is a file`), for a path that is no regular file, a file of
    more than `most` bytes, one that cannot be read, and one that is not UTF-8.
    """
    shown = require_file(path, rule, most)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{rule}, but got {shown}: {error.strerror}. Correct the path.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{rule}, but got {shown}, which is no UTF-8 text. Save it as UTF-8.") from error


def require_file(path: Path, rule: str, most: int | None = None) -> str:
    """Return the path as it is shown. Raises ConfigError, which begins with `rule`, unless it is a file that is there.

    A pipe would wait for a writer, and a device may never end. `most` is the largest size in bytes.
    """
    shown = " ".join(str(path).split("\n"))
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{rule}, but got {shown}: {error.strerror}. Correct the path.") from error
    except ValueError as error:  # a path with a null character
        raise ConfigError(f"{rule}, but got {shown!a}, which is no path. Correct it.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise ConfigError(f"{rule}, but got {shown}, which is {kind}. Name a file.")
    if most is not None and found.st_size > most:
        raise ConfigError(f"{rule} of at most {most} bytes, but got {found.st_size} in {shown}. Name another file.")
    return shown
