"""Sums and extremes over the values of a float tensor x and a calibrated one y, and over d = y - x, in one pass.

All arithmetic is float32 on parts that fit into the cache of a core. The sums of a part are torch's pairwise sums, and
the parts add up in float64. d is exact to float32 rounding, and what depends on y follows from x and d:

    |y|^2 = |x|^2 + 2 x.d + |d|^2                                 x.y = |x|^2 + x.d

so that nothing small is the difference of two large sums: a cosine near 1 keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

PART = 1 << 16  # values in one part
SMALL = 1e-15  # squares of smaller values leave the range of float32
CANCELS = 100.0  # mean^2 / variance from which a variance is not the difference of two sums
LARGEST = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class PairSums:
    """Of `n` values: sums of x, d, x^2, x d, d^2, |d|; smallest and largest x and y; largest |d| and |d / x|."""

    n: int
    x: float
    d: float
    xx: float
    xd: float
    dd: float
    l1: float
    atol: float
    rtol: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    x_var: float
    y_var: float

    @property
    def cosine(self) -> float:
        """Of the angle between x and y; 0 if one of them is all zeros, 1 if they are equal."""
        if self.dd == 0.0:
            return 1.0
        norms = math.sqrt(self.xx) * math.sqrt(max(self.xx + 2.0 * self.xd + self.dd, 0.0))
        return (self.xx + self.xd) / norms if norms else 0.0


def pair_sums(x: Tensor, y: Tensor) -> PairSums | None:
    """The sums; None if float32 cannot hold them: other dtypes, values that are not finite, too large or too small."""
    if x.dtype != torch.float32 or y.dtype != torch.float32:
        return None
    flat = in_memory_order(x, y)
    sums, lows, highs = [], [], []
    for p, q in parts(*flat):
        d = q - p
        work = torch.mul(p, p)
        found = [p.sum(), d.sum(), work.sum()]
        found += [torch.mul(p, d, out=work).sum(), torch.mul(d, d, out=work).sum()]
        ratio = torch.aminmax(torch.div(d, p, out=work))
        sums += [*found, d.abs_().sum()]
        ends = [torch.aminmax(p), torch.aminmax(q), ratio]
        lows += [end.min for end in ends]
        highs += [*(end.max for end in ends), d.amax()]
    sx, sd, xx, xd, dd, l1 = torch.stack(sums).view(-1, 6).sum(0, dtype=torch.float64).tolist()
    low, high = torch.stack(lows).view(-1, 3).amin(0).tolist(), torch.stack(highs).view(-1, 4).amax(0).tolist()
    atol, largest, n = high[3], max(-low[0], high[0]), x.numel()
    finite = math.isfinite(sx + sd + xx + xd + dd)
    if not finite or 0.0 < atol < SMALL or 0.0 < largest < SMALL:
        return None
    rtol = max(-low[2], high[2])
    yy = xx + 2.0 * xd + dd
    return PairSums(
        n, sx, sd, xx, xd, dd, l1, atol,
        rtol if math.isfinite(rtol) else _largest_ratio(*flat),
        (low[0], high[0]), (low[1], high[1]),
        _variance(flat[0], sx, xx), _variance(flat[1], sx + sd, yy),
    )  # fmt: skip


def in_memory_order(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both flat, in the order of the memory of x if it is dense: sums do not depend on the order of the values."""
    if not x.is_contiguous():
        order = _by_stride(x)
        x, y = x.permute(order), y.permute(order)
    return x.reshape(-1).contiguous(), y.reshape(-1).contiguous()


def same_values(a: Tensor, b: Tensor) -> bool:
    """True if both hold the same memory, each of its values once: one is the other, or shows it in another shape."""
    if a is b:
        return True
    alike = a.data_ptr() == b.data_ptr() and a.numel() == b.numel() > 0 and a.dtype == b.dtype
    return alike and _dense(a) and _dense(b)


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.permute(_by_stride(x)).is_contiguous()


def _by_stride(x: Tensor) -> list[int]:
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: -strides[d])


def parts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both flat tensors in parts of PART values."""
    if len(x) <= PART:
        yield x, y
        return
    for begin in range(0, len(x), PART):  # torch.split costs as much as a pass over a part
        yield x[begin : begin + PART], y[begin : begin + PART]


def _variance(x: Tensor, total: float, squares: float) -> float:
    n = len(x)
    spread = squares - total * total / n
    if total * total / n > CANCELS * spread:
        mean = total / n
        spread = math.fsum(float((p - mean).square_().sum()) for p, _ in parts(x, x))
    return max(spread, 0.0) / max(n - 1, 1)


def _largest_ratio(x: Tensor, y: Tensor) -> float:
    """Largest |y - x| / |x|; 0 / 0 counts as 0, any other division by zero as the largest float32 number."""
    largest = 0.0
    for p, q in parts(x, y):
        ratio = torch.div(q - p, p).nan_to_num_(0.0, LARGEST, -LARGEST)
        low, high = torch.aminmax(ratio)
        largest = max(largest, -float(low), float(high))
        if largest == LARGEST:
            break
    return largest
