"""Quantizers as single operators of an exported graph, so that each target can translate them its own way.

    qflow::fake_quantize(x, scale, axis, bits, name)    clamp(round(x / scale), -2^(bits-1), 2^(bits-1) - 1) * scale
    qflow::fake_half(x, clip, name)                     x rounded to float16 and back
    qflow::dequantize(codes, scale, axis, name)         codes * scale: a weight or constant that is stored as integers

`scale` has one value (axis -1) or one for each index of `axis`. `name` is that of the quantizer in the prepared model;
a weight's ends with `.weight`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qflow.quant.values.fake_quant import FakeQuant
from qflow.quant.values.grid import quantize_dequantize
from qflow.quant.values.half import to_half

CODES = {8: torch.int8, 16: torch.int16}


@torch.library.custom_op("qflow::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, axis: int, bits: int, name: str) -> Tensor:
    """`x` on the grid of `scale`, by the engine's own arithmetic."""
    lowest = -(2 ** (bits - 1))
    if axis < 0:
        return quantize_dequantize(x, float(scale), lowest, -lowest - 1)
    return quantize_dequantize(x, along(scale, axis, x.ndim), lowest, -lowest - 1)


@torch.library.custom_op("qflow::fake_half", mutates_args=())
def fake_half(x: Tensor, clip: bool, name: str) -> Tensor:
    """`x` as a half holds it."""
    return to_half(x.clone(), clip)


@torch.library.custom_op("qflow::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, axis: int, name: str) -> Tensor:
    """`codes` times their scale, in the dtype of the scale."""
    return codes.to(scale.dtype) * along(scale, axis, codes.ndim)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, axis: int, bits: int, name: str) -> Tensor:
    return torch.empty_like(x)


@fake_half.register_fake
def _(x: Tensor, clip: bool, name: str) -> Tensor:
    return torch.empty_like(x)


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, name: str) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


FAKE_QUANTIZE = torch.ops.qflow.fake_quantize.default
FAKE_HALF = torch.ops.qflow.fake_half.default
DEQUANTIZE = torch.ops.qflow.dequantize.default


def along(scale: Tensor, axis: int, ndim: int) -> Tensor:
    """The scale in the shape in which it broadcasts over a tensor of `ndim` axes."""
    return scale.reshape(()) if axis < 0 else scale.view([-1 if i == axis else 1 for i in range(ndim)])


class ExportedQuant(FakeQuant):
    """A quantizer with fixed scale that runs as one of the operators above."""

    def forward(self, x: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """`x` as the device holds it; `x` itself if the quantizer is not active."""
        if not self.active:
            return x
        assert self.dtype is not None
        if not self.dtype.is_integer:
            out: Tensor = FAKE_HALF(x, self.clip, self.name)
            return torch.where(torch.isneginf(x), x, out) if self.keeps_mask and self.clip else out
        axis = self.axis if self.scale.numel() > 1 else -1
        name = f"{self.name}.weight" if self.per_channel else self.name
        out = FAKE_QUANTIZE(x, self.scale.reshape([-1] if axis >= 0 else []), axis, self.dtype.bits, name)
        return torch.where(torch.isneginf(x), x, out) if self.keeps_mask else out
