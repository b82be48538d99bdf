"""The dampening loss of Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training" (equation 6).

    sum over weights of (quantized w - clip(w))^2      clip to the ends of the grid; no gradient through quantized w

It pulls each weight to the centre of its code, so that weights stop oscillating between two codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qflow.quant.values.fake_quant import FakeQuant


@contextmanager
def dampened(weights: Mapping[str, FakeQuant]) -> Iterator[dict[str, Tensor]]:
    """Within the context, each integer weight that is quantized leaves its term, by name of its quantizer."""
    found: dict[str, Tensor] = {}

    def keep(quantizer: FakeQuant, args: tuple[Any, ...], out: Tensor) -> None:
        weight, dtype = args[0], quantizer.dtype
        if dtype is None or not dtype.is_integer or not quantizer.active:
            return
        scale = args[1] if len(args) > 1 and args[1] is not None else quantizer.scale
        clipped = torch.clamp(weight, dtype.qmin * scale.detach(), dtype.qmax * scale.detach())
        found[quantizer.name] = (out.detach() - clipped).square().sum()

    handles = [quantizer.register_forward_hook(keep) for quantizer in weights.values()]  # type: ignore[arg-type]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
