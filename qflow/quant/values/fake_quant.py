"""Fake quantization: a quantizer with a dtype, a scale and a switch, which puts values on its grid (values/grid.py).

In training, a scale may move, as in the plugin. For activations, the ends of each batch enter a moving average,
v += c * (v_batch - v) with c = averaging_constant, which starts from the calibrated range, and
scale = max(-low, high) * margin / divisor (the margin is for int16, which suffers from clipping before it suffers from
rounding). For weights there is no average: the scale follows from the current values. c = 0 keeps the scale.

Outside training, the scale of a weight follows too if the weight is found to be another one than that which it was set
for (edited, merged, pruned, swapped in): a scale of other values would cut it off or waste its codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, ModelError
from qflow.quant.values.grid import HalfStraightThrough, quantize_dequantize, quantize_dequantize_, straight_through
from qflow.quant.values.half import overflows

EPS = float(torch.finfo(torch.float32).eps)  # smallest scale, as in the plugin


class FakeQuant(nn.Module):
    """One quantizer: a dtype, a scale, and a switch.

    The scale is a buffer (0-d for an activation, broadcastable for a weight), so it is in the state dict. A scale of 0
    means "never calibrated"; an active quantizer raises ModelError for it.
    """

    scale: Tensor
    sides: Tensor | None
    extent: Tensor | None
    present: Tensor | None

    def __init__(self, name: str, channels: int | None = None, axis: int = 0, ndim: int = 0) -> None:
        super().__init__()
        self.name = name
        self.dtype: QDtype | None = QDtype.qint8
        self.axis = axis
        self.clip = False
        """float16: saturate at the largest half instead of giving inf."""
        self.averaging_constant = 0.0
        """How fast the scale moves in train mode, as in the plugin; 0 keeps it."""
        self.learned: Tensor | None = None
        """The same scale with a gradient, during a training step that learns it (train/learned_scales.py)."""
        self.margin = 1.0
        """Range of a moving activation scale, divided by the largest value."""
        self.half_step = 0.0
        """The divisor is -qmin minus this: 0 as in the guide, 0.5 as in the plugin."""
        self.keeps_mask = False
        """True: -inf stays -inf, because it masks a softmax (trace/masks.py)."""
        self.follows = True
        """A weight's scale follows another weight outside training; false while QAT keeps weight scales."""
        self.changed = False
        """True if the last weight seen is another one than at the last calibration."""
        self._unset = "was never calibrated"
        self._enabled = False
        self._checked = False  # True once the scale is known to be above 0; each check would synchronize a GPU
        self._overflowed: Tensor | int = 0
        self.cached: Any = None
        """The quantized weight that `WeightedLeaf` caches when there are no gradients."""
        shape = [1] * ndim
        if channels is not None:
            shape[axis] = channels
        self.register_buffer("scale", torch.zeros(shape))
        # Moving averages of -low and high in units of the scale; both start at the calibrated one.
        self.register_buffer("sides", torch.zeros(2) if ndim == 0 else None)
        # Largest |w| of each scale's channel: of the weight at calibration, and of the last one seen.
        self.register_buffer("extent", None, persistent=False)
        self.register_buffer("present", None, persistent=False)

    def set_axis(self, axis: int, shape: Sequence[int]) -> None:
        """Use a scale for each index of `axis` of a weight of `shape`, or one for -1. ConfigError: no such axis."""
        if axis >= len(shape):
            raise ConfigError(f"A weight axis is one of 0 to {len(shape) - 1}, or -1, but got {axis} for {self.name}.")
        scales = [size if i == axis else 1 for i, size in enumerate(shape)]
        if list(self.scale.shape) != scales:
            self.scale = torch.zeros(scales, device=self.scale.device)
            self._checked, self.cached = False, None
            self.forget_weight()
        self.axis = axis

    @property
    def enabled(self) -> bool:
        """True if the quantizer is switched on."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        # Evaluations begin with a switch: none of them may use a stale weight.
        vars(self).update(_enabled=on, cached=None)

    @property
    def per_channel(self) -> bool:
        """True for a weight quantizer, also if it has a single scale."""
        return self.scale.ndim > 0

    @property
    def active(self) -> bool:
        """True if the quantizer changes values: it is on, and its dtype is neither None nor float32."""
        return self._enabled and self.dtype not in (None, QDtype.float32)

    @property
    def overflowed(self) -> int:
        """How many values left the range of float16 since `clear_overflow`."""
        return int(self._overflowed)

    def clear_overflow(self) -> None:
        """Reset the count of `overflowed`."""
        self._overflowed = 0

    def set_scale(self, scale: Tensor | float) -> None:
        """Set the scale, at least float32 epsilon as in the plugin. Raises ModelError unless it is finite."""
        value = torch.as_tensor(scale, dtype=torch.float32, device=self.scale.device)
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"A scale is finite, but got {value.max().item()} for {self.name}. Check data for inf.")
        with torch.no_grad():
            self.scale.copy_(value.clamp_min(EPS).reshape(self.scale.shape))
            if self.sides is not None:
                self.sides.copy_(self.scale)
        self._checked = True

    def restore_scale(self, values: float | Sequence[float]) -> None:
        """Set the scale to values that were read from a quantizer, unchanged. Raises ModelError for another number."""
        found = torch.as_tensor(values, dtype=torch.float32, device=self.scale.device)
        if found.numel() != self.scale.numel() or not bool(torch.isfinite(found).all()) or bool((found < 0).any()):
            raise ModelError(
                f"Scales are {self.scale.numel()} finite numbers of at least 0, but got {found.numel()} for "
                f"{self.name}. Take those of the same model."
            )
        with torch.no_grad():
            self.scale.copy_(found.reshape(self.scale.shape))
            if self.sides is not None:
                self.sides.copy_(self.scale)
        self._checked, self.cached = False, None

    def clear_scale(self, why: str = "was never calibrated") -> None:
        """Clear the scale, so that the quantizer does not depend on an earlier calibration; `why` is for the error."""
        self._unset = why
        self.scale.zero_()
        if self.sides is not None:
            self.sides.zero_()
        self._checked = False

    def retype(self, dtype: QDtype | None) -> None:
        """Set the dtype. If it changes, the scale is cleared, because it belongs to the codes of the old dtype."""
        if dtype != self.dtype:
            self.dtype = dtype
            self.clear_scale()

    def settings(self) -> tuple[Any, ...]:
        """The settings that decide the quantized values, beside the scale."""
        return self.dtype, self.clip, self.averaging_constant, self.half_step

    def divisor(self) -> float:
        """The scale is threshold / divisor: 128 or 127.5 for int8, 32768 or 32767.5 for int16."""
        assert self.dtype is not None
        return -self.dtype.qmin - self.half_step

    def measured(self, weight: Tensor) -> Tensor:
        """The scale of `weight` from its values: largest |w| of each channel, divided by the divisor."""
        return (self._extent(weight) / self.divisor()).clamp_min_(EPS)

    def _extent(self, weight: Tensor) -> Tensor:
        others = [d for d in range(weight.ndim) if self.scale.shape[d] == 1]
        return weight.detach().abs().amax(dim=others, keepdim=True)

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Set the scale to that of `weight` if it is another one than before; its first weight only gets known.

        Weights are the same if the largest |w| of each channel is, within the rounding of their dtype.
        """
        extent = self._extent(weight)
        if self.extent is None or self.present is None:
            self.extent = self.present = extent
        elif not _close(self.present, extent):
            self.present, self.changed = extent, not _close(self.extent, extent)
            if self.calibrated:
                self.scale.copy_(self.measured(weight))

    def forget_weight(self) -> None:
        """Take the next weight as the one that the scale was set for."""
        self.extent, self.present, self.changed = None, None, False

    def scale_for(self, x: Tensor) -> Tensor | float:
        """The scale for this call; a moving scale is first updated with `x`. Raises ModelError if there is none.

        It is a number for an activation on CPU, otherwise a tensor that no later call writes into, because a shared
        module moves its scale again before the backward pass of its first call.
        """
        if self.learned is not None and torch.is_grad_enabled():
            return self.learned
        moves = self.averaging_constant > 0.0 and (self.training or self.per_channel) and x.numel() > 0
        if not moves and not self._checked and not torch.compiler.is_compiling():
            self._check()
        if moves:
            self._move(x)
        elif self.per_channel and self.follows and not torch.compiler.is_compiling():
            self.follow(x)
        scale = self.scale
        if scale.ndim == 0 and scale.device.type == "cpu" and not torch.compiler.is_compiling():
            return float(scale)
        return scale.clone() if torch.is_grad_enabled() else scale

    @torch.no_grad()
    def _move(self, x: Tensor) -> None:
        if self.sides is None:
            self.scale.copy_(self.measured(x))
            return
        low, high = torch.aminmax(x.masked_fill(torch.isneginf(x), 0.0) if self.keeps_mask else x)
        batch = torch.stack((-low, high)).to(self.sides.dtype) * (self.margin / self.divisor())
        # an infinite end (a mask of -inf) is not part of the range: that side stays unchanged
        self.sides.lerp_(torch.where(torch.isfinite(batch), batch, self.sides), self.averaging_constant)
        self.scale.copy_(self.sides.amax().clamp_min_(EPS))

    @property
    def calibrated(self) -> bool:
        """True if there is a scale."""
        return bool((self.scale > 0).all())

    def _check(self) -> None:
        if not self.calibrated:
            raise ModelError(f"A quantizer needs a scale, but {self.name} {self._unset}. Calibrate first.")
        self._checked = True

    def forward(self, x: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """`x` as the device holds it, on the grid of `scale` if given; `x` itself if the quantizer is not active."""
        if not self.active:
            return x
        assert self.dtype is not None
        if self.dtype == QDtype.float16:
            if not torch.compiler.is_compiling():
                self._overflowed = self._overflowed + overflows(x)
            out: Tensor = HalfStraightThrough.apply(x, self.clip)  # type: ignore[no-untyped-call]
            return torch.where(torch.isneginf(x), x, out) if self.keeps_mask and self.clip else out
        if scale is None:
            scale = self.scale_for(x)
        if not self.keeps_mask:
            return straight_through(x, scale, self.dtype.qmin, self.dtype.qmax)
        mask = torch.isneginf(x)  # masked values have no part in the gradient of a scale
        return torch.where(mask, x, straight_through(x.masked_fill(mask, 0.0), scale, self.dtype.qmin, self.dtype.qmax))

    def write(self, x: Tensor) -> None:
        """Quantize `x` in place: for results of in-place operators, without gradients."""
        plain = self.dtype is not None and self.dtype.is_integer and not self.keeps_mask
        if plain and not torch.compiler.is_compiling():
            assert self.dtype is not None
            quantize_dequantize_(x, self.scale_for(x), self.dtype.qmin, self.dtype.qmax)
        else:
            x.copy_(self(x))

    @property
    def clamps(self) -> bool:
        """True if `clamped` can replace a ReLU and this quantizer: an integer dtype, and the scale is a number."""
        integer = self.dtype is not None and self.dtype.is_integer
        return integer and self.scale.device.type == "cpu" and not torch.compiler.is_compiling()

    def clamped(self, x: Tensor, top: float | None, in_place: bool) -> Tensor:
        """relu(x), or min(relu(x), top), on the grid; `x` is float32.

        Rounding keeps the order of values, so the codes are clamped instead of the values: the same numbers with one
        pass over the tensor less.
        """
        scale = self.scale_for(x)
        assert self.dtype is not None
        assert isinstance(scale, float)
        qmax = self.dtype.qmax
        if top is not None:
            qmax = min(qmax, int(np.rint(np.float32(top) * np.float32(1.0 / scale))))
        return (quantize_dequantize_ if in_place else quantize_dequantize)(x, scale, 0, qmax)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        before = None if self.extent is None else self.extent.dtype
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.extent is not None and self.extent.dtype != before:
            self.extent = self.present = None  # with a batch norm folded in, weights differ by the precision's rounding
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cached": None, "learned": None}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.sides is not None and prefix + "scale" in state_dict:
            state_dict.setdefault(prefix + "sides", state_dict[prefix + "scale"].expand(2))
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[no-untyped-call]
        self._checked, self.cached = False, None
        self.forget_weight()


def _close(known: Tensor, extent: Tensor) -> bool:
    """True but for rounding: a batch norm is folded in anew, maybe on another device."""
    known = known.to(extent)
    return torch.equal(known, extent) or torch.allclose(known, extent, rtol=8 * torch.finfo(extent.dtype).eps, atol=0.0)
