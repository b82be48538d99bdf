"""Frames of a task in order: where sequences begin, and the float model's state before each frame.

Outside of a run, the model of a task holds the state at the start of a sequence. A task without `cached_attrs` has
samples instead of frames, and nothing to reset.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from qflow.quant.model.sequences import Along
from qflow.quant.trace.state import CachedState, Frame, cached_state
from qflow.tasks.details import details_of
from qflow.tasks.sequences import in_parallel, lengths_of
from qflow.tasks.task import Task, batches, evaluate, model_inputs
from qflow.trial.record import Evaluation

KEPT = 20_000  # samples; of more, scores are not kept, as the noise of a mean over so many needs no pairing


def beginning(task: Task, model: nn.Module) -> Callable[[], None]:
    """Return a function that puts a float or prepared model of the task at the start of a sequence."""
    cached = cached_state(task.model, task.cached_attrs)
    return _nothing if cached is None else functools.partial(cached.reset, model)


def _nothing() -> None:
    """A model without state is always at the start."""


def evaluate_from_start(
    task: Task, model: nn.Module, batch_size: int, progress: Callable[[int], None], least: float | None = None
) -> Evaluation:
    """`evaluate` with the model at the start of every sequence, and at the end; scores are in the order of samples."""
    scores, starts = list[float](), [beginning(task, m) for m in (model, task.model)[: 1 + task.against_float]]

    def begin() -> None:
        for start in starts:
            start()

    try:
        metric, samples = evaluate(
            task, model, batch_size, progress, least, begin, lambda found: scores.extend(found.double().tolist())
        )
    finally:
        begin()
    if task.cached_attrs and scores:
        steps = in_parallel(lengths_of(task.data.evaluation, "evaluation"), batch_size)
        order = [sample for step in steps for sample in step.samples]
        scores = [score for _, score in sorted(zip(order, scores, strict=False))]  # an early end leaves the last out
    kept = tuple(scores) if len(scores) <= KEPT else ()
    return Evaluation(metric, samples, scores=kept, details=details_of(task.metric))


def frames(task: Task, along: Along, count: int) -> Iterator[Frame]:
    """Yield the first `count` calibration frames, one at a time, with the state of the float model before each."""
    for batch, _ in batches(task, "calibration", 1, limit=count, begin=along.begin):
        yield along.frame(model_inputs(task, batch))


def chosen_frames(task: Task, cached: CachedState, samples: list[int]) -> list[Frame]:
    """Return these calibration frames, in this order, with the state of the float model before each."""
    stream, wanted = frames(task, Along(task.model, cached), max(samples) + 1), set(samples)
    found = {i: frame for i, frame in enumerate(stream) if i in wanted}
    return [found[i] for i in samples]


def steps_of(task: Task, batch_size: int, split: str = "calibration") -> int:
    """Return in how many batches a split is read whole; with `cached_attrs`, of frames of so many sequences."""
    data: Any = getattr(task.data, split)
    if task.cached_attrs:
        return len(in_parallel(lengths_of(data, split), batch_size))
    return -(-len(data) // batch_size)
