"""What a repair step is, what it works with, and the table of what was tried.

A step changes the float weights of a prepared model, or its qconfig (observers, fixed scales), so that the model loses
less when it is quantized. Nothing else carries a repair: the keys and shapes of the float state dict stay, and the
device gets one (scale, dtype) an operator, as before. A step names its parts (a group of layers, a layer); `run.py`
applies all parts at once, measures, and tries halves of them where the whole does not help.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings
from qflow.core.shown import Shown, View
from qflow.quant.model.calibrate import CalibrationStats, apply_scales, collect
from qflow.quant.model.quantized_model import QuantizedModel

KEPT, UNDONE, REFUSED = "kept", "undone", "refused"


@dataclass
class Context:
    """What steps work with: batches for calibration, statistics and the qconfig of the model as it is now.

    The held-out samples that decide are not in it, so that no step can fit them.
    """

    batches: Sequence[tuple[Any, int]]
    """Model inputs and their number of samples; every batch is read in every pass."""
    qconfig: QConfig
    """The qconfig of the model; a step that sets observers or scales puts another one here."""
    settings: CalibrationSettings = field(default_factory=CalibrationSettings)
    stats: CalibrationStats | None = None
    """The statistics of the last calibration of the present weights."""
    forwards: int = 0
    """Samples that were run through the model so far, by calibrations, measurements and steps together."""

    @property
    def samples(self) -> int:
        """The number of samples in `batches`."""
        return sum(size for _, size in self.batches)

    def calibrate(self, prepared: QuantizedModel) -> None:
        """Set all scales anew for the present weights and qconfig."""
        by_batch = self.settings.averaging_constant is not None
        self.stats = collect(prepared, self.batches, sampling=self.settings.sampling, by_batch=by_batch)
        apply_scales(prepared, self.stats, self.qconfig, self.settings)
        self.forwards += self.samples


@dataclass(frozen=True)
class Part:
    """What a step can change alone: a name for the table, and what only the step itself reads."""

    name: str
    data: Any = None


class Step(ABC):
    """One kind of repair. It is label-free and deterministic: equal weights and batches give equal results."""

    name: ClassVar[str]
    preserving: ClassVar[bool] = False
    """True if the float function stays as it is; `run.py` verifies it."""

    def needs(self, prepared: QuantizedModel, context: Context) -> str:
        """Return what the step lacks in order to run on this model, as a reason for the table; empty if nothing."""
        return ""

    @abstractmethod
    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Mapping[str, str]]:
        """Return the parts that can be repaired, in order of execution, and name -> reason of what cannot."""

    @abstractmethod
    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        """Change weights in place, or `context.qconfig`, for these parts; return part name -> what was changed.

        It starts from a calibrated model, whose scales it need not renew. A part without an entry was left as it is.
        """

    def undo(self, prepared: QuantizedModel, context: Context, before: Point) -> None:
        """Take back what `apply` did. A step that keeps state of its own takes that back too."""
        before.restore(prepared, context)


@dataclass(frozen=True)
class Point:
    """The float weights and the qconfig at one time: all that a step may change."""

    weights: Mapping[str, Tensor]
    qconfig: QConfig

    @classmethod
    def of(cls, prepared: QuantizedModel, context: Context) -> Point:
        """Copy the present ones."""
        held = [*prepared.model.named_parameters(), *prepared.model.named_buffers()]
        return cls({name: tensor.detach().clone() for name, tensor in held}, context.qconfig)

    @torch.no_grad()
    def restore(self, prepared: QuantizedModel, context: Context) -> None:
        """Write them back. Tensors that did not change are not written, so that nothing has to be computed anew."""
        for name, tensor in [*prepared.model.named_parameters(), *prepared.model.named_buffers()]:
            if not torch.equal(tensor, self.weights[name]):
                tensor.copy_(self.weights[name])
        context.qconfig = self.qconfig


@dataclass(frozen=True)
class Row:
    """One attempt of a step, or one part that it refused.

    `before` and `after` are mean errors on the held-out samples, `change` is the mean of the paired differences
    (negative: better) and `noise` its standard error, None where nothing was measured or it is not finite. The error of
    a sample is |quantized - float| / |float|, Euclidean, averaged over the outputs (measure.py).
    """

    step: str
    parts: tuple[str, ...]
    verdict: str
    """`kept`, `undone` (tried, measured and taken back) or `refused` (not tried)."""
    reason: str
    before: float | None = None
    after: float | None = None
    change: float | None = None
    noise: float | None = None
    changed: Mapping[str, str] = field(default_factory=dict)
    """Part -> what was changed in it, of what was tried."""
    forwards: int = 0
    """Samples that were run through the model for it."""


@dataclass(frozen=True, repr=False)
class RepairTable(Shown):
    """What a repair tried, kept, took back and refused, in order.

    `before` and `after` are mean errors of all outputs on `held_out` calibration samples that no step has seen; None if
    nothing was measured, or an error is not finite.
    """

    rows: tuple[Row, ...]
    before: float | None
    after: float | None
    held_out: int
    samples: int
    """Calibration samples that the steps worked with."""
    forwards: int
    """Samples that were run through the model in all; divided by the number of samples: passes over the data."""

    @classmethod
    def refused(cls, steps: Sequence[str], reason: str) -> RepairTable:
        """Return the table of a model or data that no step can work with."""
        return cls(tuple(Row(step, (), REFUSED, reason) for step in steps), None, None, 0, 0, 0)

    @property
    def kept(self) -> tuple[Row, ...]:
        """The attempts that were kept."""
        return tuple(row for row in self.rows if row.verdict == KEPT)

    def view(self) -> View:
        """Return the attempts as a table."""
        kept = len(self.kept)
        title = f"{kept} of {len(self.rows)} repairs kept"
        if self.before is not None and self.after is not None:
            title += f": error of the outputs {self.before:.4g} -> {self.after:.4g} on {self.held_out} held-out samples"
        header = ("step", "parts", "verdict", "error before", "after", "change", "noise", "reason")
        rows = [
            (row.step, _named(row.parts), row.verdict, row.before, row.after, row.change, row.noise, row.reason)
            for row in self.rows
        ]
        return View(title, header, rows)


def _named(parts: tuple[str, ...]) -> str:
    return ", ".join(parts) if len(parts) < 3 else f"{parts[0]} and {len(parts) - 1} more"
