"""Activation scales that are trained beside the weights: learned step size quantization (Esser et al. 2020, "LSQ").

What is trained is the logarithm of each scale, relative to the calibrated one: a scale stays positive, a rate of 0
keeps it bit for bit, and an optimizer that normalizes its gradients, as Adam, changes scales of all sizes by the same
share. Its gradient is that of the scale (values/grid.py) divided by the scale, so that a step of plain gradient descent
is that of LSQ to first order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.core.qconfig import QConfig
from qflow.core.settings import QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.qat_state import free_outputs
from qflow.quant.values.fake_quant import EPS, FakeQuant

GROUP = "learned scales"
"""Name of their group in the optimizer."""


class LearnedScales:
    """The int8 activation scales of a model that its qconfig neither fixes nor freezes, as one parameter."""

    def __init__(self, quantizers: Sequence[FakeQuant], ratio: float) -> None:
        self.quantizers, self.ratio = list(quantizers), ratio
        self.start = torch.stack([q.scale.detach().clone() for q in self.quantizers])
        self.logarithms = nn.Parameter(torch.zeros_like(self.start))

    @classmethod
    def of(
        cls, prepared: QuantizedModel, settings: QatSettings, qconfig: QConfig | None = None
    ) -> LearnedScales | None:
        """Return the scales that `settings` learn; None if they learn none, or if no operator is int8."""
        if not settings.learned_scales:
            return None
        found = [q for q in free_outputs(prepared, settings, qconfig) if q.dtype == QDtype.qint8 and q.calibrated]
        return cls(found, settings.learned_scales) if found else None

    def group(self, learning_rate: float) -> dict[str, Any]:
        """Their group for an optimizer: no weight decay, and `ratio` times the rate of the weights."""
        return {"params": [self.logarithms], "lr": learning_rate * self.ratio, "weight_decay": 0.0, "name": GROUP}

    @contextmanager
    def step(self) -> Iterator[None]:
        """Forward and backward passes inside give the gradient; the optimizer steps after it."""
        leaf = self._scales().requires_grad_()
        self._write(leaf.detach())
        try:
            for quantizer, scale in zip(self.quantizers, leaf.unbind(), strict=True):
                quantizer.learned = scale
            yield
        finally:
            for quantizer in self.quantizers:
                quantizer.learned = None
        if leaf.grad is not None:
            gradient = leaf.grad / leaf.detach()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(gradient)
                gradient = gradient / torch.distributed.get_world_size()
            self.logarithms.grad = gradient

    def first_bad(self) -> str:
        """The first quantizer whose gradient is not finite; empty if all are."""
        if self.logarithms.grad is None:
            return ""
        bad = (~torch.isfinite(self.logarithms.grad)).nonzero().flatten().tolist()
        return self.quantizers[bad[0]].name if bad else ""

    def write(self) -> None:
        """Set the scales of the quantizers, after each step of the optimizer."""
        self._write(self._scales())

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of them."""
        return {"start": self.start, "logarithms": self.logarithms.detach()}

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        self.start.copy_(state["start"])
        self.logarithms.copy_(state["logarithms"])
        self.write()

    @torch.no_grad()
    def _scales(self) -> Tensor:
        return (self.start * self.logarithms.exp()).clamp_min(EPS)

    @torch.no_grad()
    def _write(self, scales: Tensor) -> None:
        for quantizer, scale in zip(self.quantizers, scales.unbind(), strict=True):
            quantizer.scale.copy_(scale)
            if quantizer.sides is not None:
                quantizer.sides.copy_(scale)
