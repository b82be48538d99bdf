"""Fake quantization: quantize, clamp and dequantize in float, with a straight-through gradient.

    y = clamp(round(x / scale), qmin, qmax) * scale        half to even, zero point 0

Hand-written in four element-wise kernels because torch's builtin is scalar code on CPU (measured 11 times
slower) and maps NaN to qmin * scale, which hides divergence; here NaN stays NaN. The gradient passes where x
lies within the codes (torch's own bounds, half a step beyond the ends) and is zero outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError

EPS = float(torch.finfo(torch.float32).eps)  # floor of a scale, as in the plugin


def quantize_dequantize(x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """`x` on the grid of `scale` (a number, or a tensor that broadcasts, for weights per channel)."""
    inverse = 1.0 / scale
    return x.mul(inverse).round_().clamp_(qmin, qmax).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
        low, high = (qmin - 0.5) * scale, (qmax + 0.5) * scale
        ctx.save_for_backward((x >= low) & (x <= high))
        return quantize_dequantize(x, scale, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


class _HalfStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0],)  # casting the gradient to half would flush small gradients to zero


class FakeQuant(nn.Module):
    """One quantizer: a dtype, a scale, and a switch.

    The scale is a buffer (0-d, or one entry a channel shaped to broadcast over the weight), so that it lives
    in the state dict. A scale of 0 means "never calibrated" and is refused when switched on.
    """

    scale: Tensor

    def __init__(self, name: str, channels: int | None = None, axis: int = 0, ndim: int = 0) -> None:
        super().__init__()
        self.name = name
        self.dtype: QDtype | None = QDtype.qint8
        self.enabled = False
        self.axis = axis
        shape = [1] * ndim
        if channels is not None:
            shape[axis] = channels
        self.register_buffer("scale", torch.zeros(shape))
        self._number = 0.0  # the scale of a per-tensor quantizer as a Python number: no device sync in forward

    @property
    def per_channel(self) -> bool:
        """True for a weight quantizer."""
        return self.scale.ndim > 0

    @property
    def active(self) -> bool:
        """True where the quantizer changes values: switched on and not high precision or float32."""
        return self.enabled and self.dtype not in (None, QDtype.float32)

    def set_scale(self, scale: Tensor | float) -> None:
        """Set the scale, floored at float32 epsilon as the plugin does. Raises ModelError unless it is finite."""
        value = torch.as_tensor(scale, dtype=torch.float32, device=self.scale.device)
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"A scale is finite, but got {value.max().item()} for {self.name}. Check data for inf.")
        self.scale.copy_(value.clamp_min(EPS).reshape(self.scale.shape))
        self._number = 0.0 if self.per_channel else float(self.scale)

    def clear_scale(self) -> None:
        """Forget the scale: what a quantizer computes must not depend on what it was before."""
        self.scale.zero_()
        self._number = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """`x` as the device would hold it; `x` itself where the quantizer is off."""
        if not self.active:
            return x
        assert self.dtype is not None
        if self.dtype == QDtype.float16:
            return _HalfStraightThrough.apply(x)  # type: ignore[no-any-return, no-untyped-call]
        scale: Tensor | float = self.scale if self.per_channel else (self._number or float(self.scale))
        if not self.per_channel and scale == 0.0:
            raise ModelError(f"A quantizer needs a scale, but {self.name} was never calibrated. Calibrate first.")
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, scale, self.dtype.qmin, self.dtype.qmax)  # type: ignore[no-any-return, no-untyped-call]
        return quantize_dequantize(x, scale, self.dtype.qmin, self.dtype.qmax)
