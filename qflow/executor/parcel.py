"""An answer together with the files of its task, as bytes: for a worker that shares no folder with the driver.

A parcel is one line of JSON, with the length of the answer and names and sizes of the files, and then their contents.
It comes from another machine, so names and sizes are checked before a file is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qflow.core.errors import TrialError

MOST_FILES, LONGEST_NAME, DEEPEST = 1000, 200, 4
LARGEST = 2**30  # bytes that a trial may return, files and answer together


def packed(answer: bytes, folder: Path) -> bytes:
    """Return the answer with all files below `folder`. Raises TrialError if they are too many or too large."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    _check({"answer": len(answer), "files": sizes})
    contents = [file.read_bytes() for file in files]
    named = dict(zip(sizes, map(len, contents), strict=True))
    return b"".join([json.dumps({"answer": len(answer), "files": named}).encode(), b"\n", answer, *contents])


def unpacked(parcel: bytes, folder: Path | None) -> bytes:
    """Write the files of a parcel into `folder`, which is empty, and return its answer.

    Raises TrialError, before anything is written, for a name or a size that no trial of qflow has.
    """
    head, _, rest = parcel.partition(b"\n")
    try:
        content = json.loads(head) if len(head) <= 2 * MOST_FILES * LONGEST_NAME else None
    except (ValueError, RecursionError):
        content = None
    sizes = _check(content)
    assert content is not None
    if len(rest) != content["answer"] + sum(sizes.values()):
        raise _refused("other sizes than it states")
    start = content["answer"]
    for name, size in sizes.items() if folder is not None else ():
        assert folder is not None
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("xb") as out:
            out.write(rest[start : start + size])
        start += size
    return rest[: content["answer"]]


def _check(content: Any) -> Mapping[str, int]:
    """Return the sizes of the files by name. Raises TrialError."""
    sizes = content.get("files") if isinstance(content, dict) and set(content) == {"answer", "files"} else None
    if not isinstance(sizes, dict) or not all(type(n) is int and n >= 0 for n in [content["answer"], *sizes.values()]):
        raise _refused("another form")
    if wrong := [name for name in sizes if not _plain(name)]:
        raise _refused(f"a file called {wrong[0][:LONGEST_NAME]!r}")
    total = content["answer"] + sum(sizes.values())
    if len(sizes) > MOST_FILES or total > LARGEST:
        raise _refused(f"{len(sizes)} files, {total} bytes")
    return sizes


def _plain(name: str) -> bool:
    parts = name.split("/")
    ordinary = all(part not in ("", ".", "..") and part.isprintable() and not set(part) & set("\\:") for part in parts)
    return ordinary and len(parts) <= DEEPEST and len(name) <= LONGEST_NAME


def _refused(got: str) -> TrialError:
    return TrialError(
        f"A worker returns at most {MOST_FILES} files with plain names and {LARGEST >> 20} MiB, but got {got}. "
        "Use executor=process, whose workers share a folder."
    )
