"""Values on the grid of a scale, with a straight-through gradient.

    y = clamp(round(x / scale), qmin, qmax) * scale        half to even, zero point 0

It is written in four element-wise kernels, because torch's builtin is scalar code on CPU (measured 11 times slower) and
maps NaN to qmin * scale, which hides divergence; here NaN stays NaN. The gradient passes where the code of x lies
within qmin..qmax (torch's own mask, bit for bit) and is zero outside.

A scale may have a gradient too (learned step size, Esser et al. 2020, equations 3 and 4):

    dy/dscale = code - x / scale  within qmin..qmax, else the end that x is clamped to,      times 1 / sqrt(n * qmax)

for the n values of the tensor. The factor balances the change of a scale with that of the weights (section 2.2 there).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qflow.quant.values.half import to_half


def quantize_dequantize(x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """`x` on the grid of `scale`: a number, or a tensor that broadcasts (one scale per channel of a weight)."""
    inverse = 1.0 / (scale if isinstance(scale, float) else scale.to(x.dtype))
    return x.mul(inverse).round_().clamp_(qmin, qmax).mul_(scale)


def quantize_dequantize_(x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """As `quantize_dequantize`, but in place."""
    inverse = 1.0 / (scale if isinstance(scale, float) else scale.to(x.dtype))
    return x.mul_(inverse).round_().clamp_(qmin, qmax).mul_(scale)


@functools.lru_cache(maxsize=4096)
def gradient_bounds(scale: float, qmin: int, qmax: int, double: bool) -> tuple[float, float]:
    """Open interval of the x whose code is not clamped, exact in the arithmetic of the forward pass.

    Nominally ((qmin - 0.5) * scale, (qmax + 0.5) * scale). As x * (1 / scale) is rounded, the last ulps are tested one
    by one. A tie rounds half to even: qmin - 0.5 goes to qmin and is inside, qmax + 0.5 is outside.
    """
    kind = np.float64 if double else np.float32
    inverse, infinity = kind(1.0 / scale), kind(np.inf)
    low, high = kind((qmin - 0.5) * scale), kind((qmax + 0.5) * scale)
    for _ in range(4):  # two ulps are enough: one of the product, one of the bound
        low = np.nextafter(low, -infinity) if low * inverse >= qmin - 0.5 else low
        high = np.nextafter(high, infinity) if high * inverse < qmax + 0.5 else high
    for _ in range(4):
        above, below = np.nextafter(low, infinity), np.nextafter(high, -infinity)
        low = above if above * inverse < qmin - 0.5 else low
        high = below if below * inverse >= qmax + 0.5 else high
    return float(low), float(high)


class StraightThrough(torch.autograd.Function):
    """The forward saves only x: a saved mask would cost as much memory traffic as the quantization itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
        ctx.limits, ctx.number = (qmin, qmax), None if isinstance(scale, Tensor) else scale
        ctx.save_for_backward(x, *([scale] if isinstance(scale, Tensor) else []))
        return quantize_dequantize(x, scale, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *scale = ctx.saved_tensors
        qmin, qmax = ctx.limits
        if scale:
            code = x.mul(1.0 / scale[0].to(x.dtype)).round_()
            return grads[0] * ((code >= qmin) & (code <= qmax)), None, None, None
        low, high = gradient_bounds(ctx.number, qmin, qmax, x.dtype == torch.float64)
        return torch.ops.aten.hardtanh_backward(grads[0], x, low, high), None, None, None


class LearnedScale(torch.autograd.Function):
    """As `StraightThrough`, with the gradient of a scale that is one number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
        number = float(scale) if scale.device.type == "cpu" else scale.detach()
        ctx.limits, ctx.number = (qmin, qmax), number
        ctx.save_for_backward(x)  # not the result, into which relu(inplace=True) may write
        return quantize_dequantize(x, number, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (qmin, qmax), scale = ctx.saved_tensors, ctx.limits, ctx.number
        if isinstance(scale, float):
            low, high = gradient_bounds(scale, qmin, qmax, x.dtype == torch.float64)
            inside = torch.ops.aten.hardtanh_backward(grads[0], x, low, high)
        else:
            code = x.mul(1.0 / scale.to(x.dtype)).round_()
            inside = grads[0] * ((code >= qmin) & (code <= qmax))
        # scale * dy/dscale is y - x within the range and y beyond it
        out = quantize_dequantize(x, scale, qmin, qmax)
        kind = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 the difference would be lost
        total = (grads[0].to(kind) * out - inside.to(kind) * x).sum()
        return inside, (total / scale / math.sqrt(max(x.numel(), 1) * qmax)).to(torch.float32), None, None


def straight_through(x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """`x` on the grid of `scale`, with the gradients that are asked for: of x, and of a scale that requires one."""
    if torch.is_grad_enabled():
        if isinstance(scale, Tensor) and scale.requires_grad:
            return LearnedScale.apply(x, scale, qmin, qmax)  # type: ignore[no-any-return, no-untyped-call]
        if x.requires_grad:
            return StraightThrough.apply(x, scale, qmin, qmax)  # type: ignore[no-any-return, no-untyped-call]
    return quantize_dequantize(x, scale, qmin, qmax)


class HalfStraightThrough(torch.autograd.Function):
    """float16 in the forward; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: bool) -> Tensor:
        return to_half(x, clip)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None  # casting the gradient to half would flush small gradients to zero
