"""Stress: weights at 6 bits, by the weight quantizers of a prepared model; the library itself is as it is.

A weight takes every fourth int8 code, and the largest of each scale its own, as `round_weights(bits=6)` has it. All
functions of `qflow.repair` that take a number of bits take 6 meanwhile.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import Tensor

import qflow.repair
from qflow.core.dtype import QDtype
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.values.fake_quant import FakeQuant
from qflow.quant.values.grid import quantize_dequantize

STRIDE = 4
"""The int8 codes that are left are multiples of it: 64 of 256."""


class SixBits(FakeQuant):
    """A weight quantizer with every fourth int8 code."""

    def forward(self, x: Tensor, scale: Tensor | float | None = None) -> Tensor:
        """`x` on the coarse grid if it is at int8."""
        if not self.active or self.dtype != QDtype.qint8:
            return super().forward(x, scale)
        if scale is None:
            scale = self.scale_for(x)
        low, high = QDtype.qint8.qmin // STRIDE, (QDtype.qint8.qmax + 1) // STRIDE - 1
        coarse = quantize_dequantize(x, scale * STRIDE, low, high)
        return torch.where(x.abs() == self._extent(x), super().forward(x, scale), coarse)


def stressed(prepared: QuantizedModel) -> None:
    """Give the weights of `prepared` 6 bits, and of every copy that is made of it."""
    for quantizer in prepared.weights.values():
        quantizer.__class__ = SixBits
        quantizer.cached = None


@contextmanager
def steps_at(bits: int) -> Iterator[None]:
    """Every function of qflow.repair with an argument `bits`, which is 8 by default, has `bits` as the default."""
    found = {function: function.__defaults__ for function in _functions() if _default(function) == 8}
    for function, before in found.items():
        assert before is not None
        names = list(inspect.signature(function).parameters)[-len(before) :]
        function.__defaults__ = tuple(bits if n == "bits" else v for n, v in zip(names, before, strict=True))
    try:
        yield
    finally:
        for function, before in found.items():
            function.__defaults__ = before


def _functions() -> Iterator[FunctionType]:
    for module in pkgutil.walk_packages(qflow.repair.__path__, "qflow.repair."):
        loaded = importlib.import_module(module.name)
        for value in list(vars(loaded).values()):
            if isinstance(value, FunctionType) and value.__module__ == loaded.__name__:
                yield inspect.unwrap(value)  # torch.no_grad wraps functions


def _default(function: FunctionType) -> object:
    parameter = inspect.signature(function).parameters.get("bits")
    return None if parameter is None else parameter.default
