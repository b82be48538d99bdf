"""fp16 simulated in fp32: values are rounded to half and back, and those that overflow are counted.

A cast rounds to nearest, ties to even: 11 significant bits from 2^-14 = 6.1e-5, steps of 2^-24 = 6.0e-8 below that
(subnormals are kept, not flushed). The largest half is 65504. Values closer to it than to 65536 round to it, so
overflow starts at |x| = 65520, where the tie goes to the even neighbour, infinity.

The width of the accumulator is not simulated: operands and results are halves, sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_MAX = 65504.0
OVERFLOW = 65520.0  # halfway between the largest half and 65536: from here a cast gives infinity


def to_half(x: Tensor, clip: bool = False) -> Tensor:
    """`x` as a half holds it, in the dtype of `x`; `clip` saturates at +-65504 (infinities too). NaN stays NaN."""
    if clip:
        x = x.clamp(-HALF_MAX, HALF_MAX)
    return x.to(torch.float16).to(x.dtype)


def overflows(x: Tensor) -> int:
    """How many finite values of `x` become infinite in half."""
    magnitude = x.abs()
    return int(
        ((magnitude >= OVERFLOW) & (magnitude < torch.inf)).sum()
    )  # inf and NaN do not count: they were not finite before
