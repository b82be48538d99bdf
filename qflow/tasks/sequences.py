"""The order in which samples are read: batches of any samples, or frames of sequences for a model with state.

A split of frames has an attribute `sequences`: the lengths of its sequences, in the order of its samples. Sequences of
equal length that follow each other are read in parallel: the t-th batch of such a group holds their t-th frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qflow.core.errors import ConfigError


@dataclass(frozen=True)
class Step:
    """The samples of one batch; `begins` is True for the first frames of sequences."""

    samples: Sequence[int]
    begins: bool = False


def in_batches(samples: Sequence[int], batch_size: int) -> list[Step]:
    """`samples` in their order, `batch_size` of them at a time."""
    return [Step(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]


def in_parallel(lengths: Sequence[int], batch_size: int) -> list[Step]:
    """All frames of sequences with these lengths, of at most `batch_size` sequences at a time."""
    found: list[Step] = []
    first = 0
    for length, group in groupby(lengths):
        starts = [first + i * length for i, _ in enumerate(group)]
        first = starts[-1] + length
        for some in (starts[i : i + batch_size] for i in range(0, len(starts), batch_size)):
            found += [Step([start + t for start in some], begins=t == 0) for t in range(length)]
    return found


def lengths_of(data: Any, split: str) -> tuple[int, ...]:
    """The lengths of the sequences in a split. Raises ConfigError if it names none, or not of all its samples."""
    lengths = getattr(data, "sequences", None)
    if lengths is None:
        raise ConfigError(
            f"A task with cached_attrs reads frames in order, but got no sequences in task.data.{split}. Give the "
            "dataset the attribute `sequences`: the lengths of its sequences, in order."
        )
    found = tuple(int(length) for length in lengths)
    if any(length < 1 for length in found) or sum(found) != len(data):
        raise ConfigError(
            f"The sequences of a split hold its samples, {len(data)}, but got lengths with a sum of {sum(found)} in "
            f"task.data.{split}. Give the length of every sequence, in order."
        )
    return found
