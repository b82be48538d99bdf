"""Clipping of int8 weights: a smaller scale where the largest weight costs the others more than it is worth.

The scale of a weight channel follows from its largest |w|, so one large weight widens the step of all. For a threshold
T on the folded |w| of a channel, s = T / divisor and q the code of int8, the squared error of the output is about

    sum_j m_j (s q(w_j / s) - w_j)^2,     m_j = sum of squares of the quantized input that w_j is multiplied with

which is the diagonal part of D H D^T (columns.py). T is the one of least error among shares of the largest |w|, for
each channel, or for the whole weight if it has one scale. Then the float weight is clipped to T, divided by the factor
of the batch norm that is folded in: the scale follows from it in any calibration, and nothing else is stored.

The diagonal part does not see that clipped values all err to the same side, so only a clear gain counts (`GAIN`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import DEAD, WeightedLeaf
from qflow.quant.values.fake_quant import EPS, FakeQuant
from qflow.repair.base.contract import Context, Part, Step
from qflow.repair.base.operators import Skipped, writable_leaves
from qflow.repair.weights.columns import as_rows, from_rows
from qflow.repair.weights.rounding import input_moments, write
from qflow.repair.weights.weight_steps import Reference

SHARES = tuple(share / 50 for share in range(49, 4, -1))
"""Thresholds that are tried, as shares of the largest |w|: 0.98 down to 0.1."""
GAIN = 0.2
"""The squared error falls by this share at least: of each channel that is clipped, and of the whole operator."""


class WeightClipping(Step):
    """Clip the int8 weights whose error falls with a smaller scale; a part for each weight."""

    name = "weight_clipping"

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Skipped]:
        chosen, skipped = writable_leaves(prepared)
        found = clipped_weights(prepared, [inputs for inputs, _ in context.batches])
        context.forwards += context.samples
        skipped |= {name: f"no smaller scale takes {GAIN:.0%} off its error" for name in chosen if name not in found}
        return [Part(name, clipped) for name, clipped in found.items()], skipped

    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        self.reference.take(prepared, context)
        chosen, _ = writable_leaves(prepared)
        for part in parts:
            write(prepared, part.name, chosen[part.name], part.data.weight)
        return {part.name: str(part.data) for part in parts}


@dataclass(frozen=True)
class Clipped:
    """The clipped weight of one operator."""

    weight: Tensor
    """The float weight, before the batch norm is folded in."""
    channels: int
    """Scales that became smaller, out of `total`."""
    total: int
    lowest: float
    """The smallest threshold, as a share of the largest |w| of its channel."""
    before: float
    """Root of the squared error (module docstring) relative to that of weights of 0: the relative error of the output,
    if inputs are independent."""
    after: float

    def __str__(self) -> str:
        which = f"{self.channels} of {self.total} channels" if self.total > 1 else "the weight"
        return (
            f"{which} clipped to {self.lowest:.2g} of the largest |w| or more, error {self.before:.3g} -> "
            f"{self.after:.3g}"
        )


@torch.no_grad()
def clipped_weights(prepared: QuantizedModel, batches: Sequence[Any], bits: int = 8) -> dict[str, Clipped]:
    """Operator -> its clipped weight, where that has the smaller error, from one pass over `batches` of model inputs.

    `prepared` is calibrated and in eval mode; nothing is written. Fewer `bits` keep to every 2^(8 - bits)-th code, as a
    stress test. An operator whose inputs are not finite, or that the samples do not reach, is not in the result.
    """
    chosen, _ = writable_leaves(prepared)
    squares = input_moments(prepared, chosen, batches, of=_squares)
    found = {name: _clipped(chosen[name], prepared.weights[name], own.double(), bits) for name, own in squares.items()}
    return {name: clipped for name, clipped in found.items() if clipped is not None}


def _squares(columns: Tensor) -> Tensor:
    """Sums of squares of the inputs, [groups, inputs]."""
    return columns.square().sum(2)


def _clipped(leaf: WeightedLeaf, quantizer: FakeQuant, squares: Tensor, bits: int) -> Clipped | None:
    """The weight with the thresholds of least error; None if the gain is too small, or an input was not finite."""
    if not bool(torch.isfinite(squares).all()):
        return None
    folded = leaf.folded()[0].detach().double()
    m = from_rows(leaf, squares[:, None, :].expand_as(as_rows(leaf, folded)))
    others = [d for d in range(folded.ndim) if quantizer.scale.shape[d] == 1]
    largest = folded.abs().amax(dim=others, keepdim=True)
    stride = 2 ** (8 - bits)

    def error(threshold: Tensor) -> Tensor:
        """The squared error for each scale, of the shape of the scale."""
        step = (threshold / quantizer.divisor()).clamp_min(EPS) * stride
        codes = (folded / step).round().clamp(-128 // stride, 128 // stride - 1)
        squared: Tensor = (codes * step - folded).square() * m
        return squared.sum(dim=others, keepdim=True)

    before = error(largest)
    shares, least = torch.ones_like(largest), before
    for share in SHARES:
        found = error(share * largest)
        better = (found < least) & (found <= (1 - GAIN) * before)
        shares, least = torch.where(better, share, shares), torch.where(better, found, least)
    clipped, total = shares < 1, float((folded.square() * m).sum())
    if not bool(clipped.any()) or float(least.sum()) > (1 - GAIN) * float(before.sum()):
        return None
    errors = ((float(e.sum()) / total) ** 0.5 for e in (before, least))
    return Clipped(
        _stored(leaf, folded, shares * largest), int(clipped.sum()), clipped.numel(), float(shares.min()), *errors
    )


def _stored(leaf: WeightedLeaf, folded: Tensor, threshold: Tensor) -> Tensor:
    """The float weight, clipped so that its folded |values| are at most `threshold`."""
    own, over, bound = leaf.weight.detach(), folded.abs() > threshold, threshold.expand_as(folded)
    if leaf.qflow_norm is not None:
        factor = leaf.along_output(leaf.factor().double()).abs().expand_as(folded)
        over = over & (factor >= DEAD)  # else the norm has switched the channel off
        bound = bound / torch.where(over, factor, torch.ones_like(factor))
    return torch.where(over, (own.sign() * bound).to(own), own)
