"""Frames of sequences in order, for models that keep temporal state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import nn
from torch.utils.data import DataLoader, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from qflow.core.errors import DataError
from qflow.quant.trace.calling import batch_size, next_state
from qflow.quant.trace.state import CachedState, Frame, State

T = TypeVar("T")


def in_order(items: Iterable[T], sequences: Sequence[int] | None, begin: Callable[[], None]) -> Iterator[T]:
    """The items (a frame each), with a call of `begin` before the first frame of each sequence.

    `sequences` are the lengths of the sequences in items; None is one sequence. Raises DataError for a shuffled loader,
    and if the items are more or fewer than the sequences hold.
    """
    refuse_shuffled(items)
    ends = list(sequences) if sequences is not None else []
    if any(length < 1 for length in ends):
        raise DataError(f"A sequence holds a frame or more, but got lengths {ends[:6]}. Leave out what is empty.")
    starts = {sum(ends[:i]) for i in range(len(ends))} | {0}
    count = -1
    for count, item in enumerate(items):
        if ends and count >= sum(ends):
            raise DataError(_other_count(sum(ends), "more"))
        if count in starts:
            begin()
        yield item
    if ends and count + 1 < sum(ends):
        raise DataError(_other_count(sum(ends), str(count + 1)))


def _other_count(held: int, got: str) -> str:
    return f"Sequences hold all items of the data, {held}, but got {got}. Give the lengths of the sequences in items."


def refuse_shuffled(items: Any) -> None:
    """Raise DataError for a DataLoader that draws its samples in random order."""
    samplers = (getattr(items, "sampler", None), getattr(getattr(items, "batch_sampler", None), "sampler", None))
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    if isinstance(items, DataLoader) and any(isinstance(sampler, random) for sampler in samplers):
        raise DataError(
            "Frames of a model with state come in order, but got a DataLoader that shuffles. Set shuffle=False."
        )


class Along:
    """Turns inputs in order into frames: each with the state that the float model has before it."""

    def __init__(self, model: nn.Module, cached: CachedState) -> None:
        self.model, self.cached = model, cached
        self.state: State | None = None
        self.sequences: list[tuple[int, int]] = []
        """Number of frames, and of sequences in parallel, of what came so far."""

    def begin(self) -> None:
        """The next frame is the first of a sequence."""
        self.state = None
        self.sequences.append((0, 0))

    def frame(self, inputs: Any) -> Frame:
        """`inputs` with the state before them; the float model runs on the frame, and keeps its own state."""
        count, _ = self.sequences.pop()
        self.sequences.append((count + 1, batch_size(inputs)))
        state = self.cached.start(self.model) if self.state is None else self.state
        frame, self.state = next_state(self.model, inputs, state)
        return frame
