"""The measurement that decides whether a repair is kept.

The error of sample i is the mean over the outputs of |q_i - f_i| / sqrt(mean_j |f_j|^2), where q and f are the
quantized and the float output of the sample and |.| is the Euclidean norm: relative to the usual size of an output, so
that a sample whose output is near zero does not outweigh all others. Two states of a model are compared sample by
sample, because samples differ far more from each other than two states do on the same sample:

    change = mean_i (after_i - before_i)        noise = std_i (after_i - before_i) / sqrt(n)

A repair is kept if change < -2 noise. One that leaves the float function as it is cannot do harm in float, so it is
also kept if change <= 0 and the worst sample is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.core.errors import DataError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.trace.order import Order

BEYOND = 2.0  # standard errors
SAME_FUNCTION = 1e-5
"""Largest relative difference of float outputs that counts as the same function in float32."""

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """A comparison of two states on the same samples."""

    keep: bool
    change: float
    noise: float
    reason: str


class HeldOut:
    """Held-out samples with the float outputs of the model before any repair."""

    def __init__(self, prepared: QuantizedModel, batches: Sequence[tuple[Any, int]]) -> None:
        self.batches = batches
        self.samples = sum(size for _, size in batches)
        self.wanted: list[tuple[Outputs, Order]] = []
        with torch.no_grad():
            for inputs, size in batches:
                with prepared.recording_order() as order:
                    self.wanted.append((_outputs(prepared, inputs, size), order))
        self.units = self._units()

    def _units(self) -> dict[str, float]:
        """Output -> root mean square over the samples of its norm. Raises DataError if no output can be compared."""
        squares: dict[str, list[float]] = {}
        for outputs, _ in self.wanted:
            for name, tensor in outputs.items():
                squares.setdefault(name, []).extend(_norms(tensor).square().tolist())
        units = {name: math.sqrt(sum(found) / len(found)) for name, found in squares.items()}
        units = {name: unit for name, unit in units.items() if math.isfinite(unit) and unit > 0}
        if not units:
            raise DataError(
                "A repair is measured on float outputs, but got none that is finite, not zero and has a value a "
                "sample. Give a model without its decoding, or other data."
            )
        return units

    @torch.no_grad()
    def errors(self, prepared: QuantizedModel) -> Tensor:
        """Return the error of the quantized model for each held-out sample, float64 [samples]."""
        found = []
        for (inputs, size), (wanted, order) in zip(self.batches, self.wanted, strict=True):
            with prepared.following(order), prepared.quantized():
                found.append(self._errors(_outputs(prepared, inputs, size), wanted, size))
        return torch.cat(found)

    @torch.no_grad()
    def moved(self, prepared: QuantizedModel) -> float:
        """Return the largest relative difference of an output between the present float model and the first one."""
        moved = dict.fromkeys(self.units, 0.0)
        for (inputs, size), (wanted, order) in zip(self.batches, self.wanted, strict=True):
            with prepared.recording_order(), prepared.following(order):
                got = _outputs(prepared, inputs, size)
            for name in self.units:
                moved[name] += float(_difference(got.get(name), wanted[name]).square().sum())
        return max(math.sqrt(moved[name] / self.samples) / unit for name, unit in self.units.items())

    def _errors(self, got: Outputs, wanted: Outputs, size: int) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64)
        for name, unit in self.units.items():
            total += _difference(got.get(name), wanted[name]) / unit
        return total / len(self.units)


def judged(before: Tensor, after: Tensor, preserving: bool) -> Verdict:
    """Compare errors [samples] of two states; see the head of this file for the rule."""
    d = after - before
    change = float(d.mean())
    noise = float(d.std() / math.sqrt(len(d))) if len(d) > 1 else math.inf
    if not bool(after.isfinite().all()):
        return Verdict(False, math.inf, math.inf, "the quantized outputs are not finite")
    if change < -BEYOND * noise:
        return Verdict(True, change, noise, "better beyond the noise")
    worst = float(after.max()), float(before.max())
    if preserving and change <= 0 and worst[0] < worst[1]:
        return Verdict(True, change, noise, f"not worse, worst sample {worst[1]:.3g} -> {worst[0]:.3g}")
    if change > 0:
        return Verdict(False, change, noise, "worse" if change > BEYOND * noise else "no better within the noise")
    return Verdict(False, change, noise, "better by less than the noise")


def _outputs(prepared: QuantizedModel, inputs: Any, size: int) -> Outputs:
    """The floating outputs that have one value or more for each sample."""
    tensors = dict(named_tensors(call_model(prepared, inputs)))
    return {n: t.detach() for n, t in tensors.items() if t.is_floating_point() and t.ndim and len(t) == size}


def _norms(tensor: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor.double().reshape(len(tensor), -1), dim=1)
    return norms.cpu()


def _difference(got: Tensor | None, wanted: Tensor) -> Tensor:
    """|got - wanted| for each sample; infinite where the quantized model gives another shape."""
    if got is None or got.shape != wanted.shape:
        return torch.full((len(wanted),), math.inf, dtype=torch.float64)
    difference: Tensor = got.double() - wanted.double()
    return _norms(difference)
