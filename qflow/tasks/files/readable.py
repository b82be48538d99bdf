"""Files that cannot be read are left out of a data set: named, counted, and said once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from qflow.core.errors import DataError

T = TypeVar("T")
NAMED = 3  # broken files that are named in full


def note(stage: str, text: str) -> str:
    """A line that commands print."""
    return f"{stage:<12} {text}"


def readable(
    splits: Sequence[Sequence[T]],
    files: Callable[[T], Sequence[str]],
    why: Callable[[str], str],
    *,
    root: str,
    workers: int,
) -> tuple[list[list[T]], list[str]]:
    """The samples of the two splits whose files can all be read, and a note on the others.

    `files` names the files of a sample, `why` says why one cannot be read, "" if it can. Every file is read once, by as
    many threads as there are `workers`. Raises DataError if a split has none left.
    """
    if not isinstance(workers, int) or not 0 <= workers <= 256:
        raise DataError(f"task.data.workers is a number from 0 to 256, but got {workers}. 0 loads in place.")
    every = [name for split in splits for sample in split for name in files(sample)]
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        bad = {name: text for name, text in zip(every, pool.map(why, every), strict=True) if text}
    kept = [[sample for sample in split if bad.keys().isdisjoint(files(sample))] for split in splits]
    first = ", ".join(f"{name} ({text})" for name, text in list(bad.items())[:NAMED])
    for purpose, samples in zip(("calibrate", "evaluate"), kept, strict=True):
        if not samples:
            raise DataError(
                f"Some files of a data set can be read, but got none to {purpose} with, of {len(every)} in {root}: "
                f"{first}. Check the files."
            )
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    said = f"{len(bad)} of {len(every)} files cannot be read and are left out: {first}{more}"
    return kept, [note("data", said)] if bad else []
