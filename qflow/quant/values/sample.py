"""The values of a batch that are counted, and its smallest and largest value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qflow.core.errors import DataError

WHOLE = 65536  # at least this many values of a batch are used, so that the tails of small tensors are kept


def sample_of(x: Tensor, sampling: int, batch: int) -> Tensor:
    """Every n-th value in memory order, n about `sampling`.

    n has no divisor in common with any size, so no row, column or channel is preferred, and the first value changes
    with the number of the `batch`.
    """
    if not x.is_contiguous() and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)  # a view in memory order; the order of values does not matter here
    step = max(1, min(sampling, x.numel() // WHOLE))
    while math.gcd(step, x.numel()) > 1:
        step += 1
    return x.flatten()[batch % step :: step]


def ends_of(x: Tensor, name: str) -> tuple[float, float]:
    """Smallest and largest value, in one device transfer; zeros for an empty tensor. Raises DataError for NaN."""
    if x.numel() == 0:
        return 0.0, 0.0
    low, high = torch.stack([x.amin(), x.amax()]).tolist()  # two reductions: aminmax is slower than both (measured)
    if math.isnan(low) or math.isnan(high):
        raise DataError(f"Calibration takes numbers and infinities, but got nan at {name}. Check data and model.")
    return low, high
