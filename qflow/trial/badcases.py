"""The search for bad cases on a task: its samples, its metric, and the file from which a killed search continues."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qflow.analysis.badcases.files import BadcaseInputs, named_samples
from qflow.analysis.badcases.find import Elsewhere, find_badcases
from qflow.analysis.badcases.looks import Looks, Seen
from qflow.analysis.measures.metrics import CUSTOM, Custom
from qflow.analysis.measures.tables import BadcaseTable
from qflow.core.record import digest
from qflow.core.settings import SensitivitySettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.sequences import Along
from qflow.tasks.content_digest import ContentDigest
from qflow.tasks.identity import Identity
from qflow.tasks.task import Task, batches, model_inputs
from qflow.trial.frames import chosen_frames, frames

LONG = 16  # steps; a longer search saves its state


@dataclass(frozen=True)
class BadcaseStage:
    """A search over the first `search_samples` samples of the calibration data, `batch_size` of them in each step."""

    task: Task
    settings: SensitivitySettings
    batch_size: int
    own: Custom | None = None
    """The user's own metric for choosing the bad cases; rankings and layers use `settings.metric`."""

    @property
    def samples(self) -> int:
        """Number of samples that are searched."""
        return min(self.settings.search_samples, len(self.task.data.calibration))

    @property
    def steps(self) -> int:
        """Number of batches that are searched; those of a model with state are single frames."""
        return self.samples if self.task.cached_attrs else -(-self.samples // self.batch_size)

    @cached_property
    def _own(self) -> ContentDigest:
        content = ContentDigest()
        if self.own is not None:
            content.add([self.own.function, self.own.order], "sensitivity.own_metric")
        return content

    @property
    def unidentified(self) -> list[str]:
        """Parts of the own metric that cannot be recognised at the next start."""
        return self._own.unidentified

    @property
    def key(self) -> list[Any]:
        """Everything that the table depends on beside task and model."""
        s = self.settings
        return [s.metric, s.compare, s.bad_cases, s.search_samples, self.batch_size, self._own.digest]

    def search(
        self,
        prepared: QuantizedModel,
        progress: Callable[[int], None],
        inputs: BadcaseInputs | None,
        state: tuple[Path, str] | None,
        looks: Callable[[int, int], Iterator[Seen]] | None = None,
    ) -> BadcaseTable:
        """Search the calibrated model. `state` is the state file with the name of the search that it belongs to.

        `looks(steps, done)` yields what other processes see in the steps after the first `done`.
        """
        along = None if prepared.cached is None else Along(self.task.model, prepared.cached)
        table = find_badcases(
            self.task.model,
            prepared,
            self._stream(along),
            metric=self.settings.metric if self.own is None else CUSTOM,
            count=self.settings.bad_cases,
            on_step=progress,
            custom=self.own,
            compare=self.settings.compare,
            inputs=inputs,
            state=state[0] if state else None,
            identity=state[1] if state else "",
            elsewhere=None if looks is None else Elsewhere(self.steps, functools.partial(looks, self.steps)),
        )
        return table if along is None else replace(table, sequences=tuple(along.sequences))

    def look(self, prepared: QuantizedModel, looks: Looks, step: int) -> Seen:
        """Look at the batch at a position, as the search of another process does. Not for a model with state."""
        first = step * self.batch_size
        ((batch, size),) = batches(
            self.task, "calibration", self.batch_size, indices=range(first, min(first + self.batch_size, self.samples))
        )
        with torch.no_grad(), prepared.quantized():
            return looks.look(model_inputs(self.task, batch), size)

    def _stream(self, along: Along | None) -> Iterator[tuple[Any, int]]:
        """The model inputs of each step with their number; of a model with state, a frame."""
        if along is not None:
            return ((frame, 1) for frame in frames(self.task, along, self.samples))
        stream = batches(self.task, "calibration", self.batch_size, indices=range(self.samples))
        return ((model_inputs(self.task, batch), size) for batch, size in stream)

    def state(
        self, folder: Path | None, identity: Callable[[], Identity], key: Any, say: Callable[[str], None]
    ) -> tuple[Path, str] | None:
        """Return the state file of a long search in `folder`, and the name of the search.

        It is None for a short search, and for one with a part that cannot be recognised at the next start.
        """
        if folder is None or self.steps <= LONG:
            return None
        task = identity()
        if unknown := [*task.unidentified, *self.unidentified]:
            say(f"{'bad cases':<12} a killed search starts over: {unknown[0]} cannot be recognised at the next start")
            return None
        name = digest([task.content, key])
        return folder / f"{name}.pt", name

    def read(self, prepared: QuantizedModel, table: BadcaseTable, inputs: BadcaseInputs) -> None:
        """Read the inputs of the samples that are named in `table`, which came from the cache."""
        named = list(named_samples(table))
        if prepared.cached is not None:
            found: list[Any] = [*chosen_frames(self.task, prepared.cached, named)]
        else:
            found = [model_inputs(self.task, b) for b, _ in batches(self.task, "calibration", 1, indices=named)]
        for index, one in zip(named, found, strict=True):
            inputs.update(one, index, 1, [*inputs.samples, index])
