"""KL divergence of two tensors as in torch's KLDivLoss: mean over all elements of p (log p - log q).

p and q are the softmax of x and y over dim 1, over the last dim below 3-d. With d = y - x, and m its mean under p, the
sum over a row is log E_p[exp(d - m)]: no difference of large numbers, and no exponential of y. Where all |d - m| are
small, as they are after quantization, it is log(1 + E_p[g]) with a polynomial for g(c) = exp(c) - 1 - c.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qflow.analysis.measures.pair_sums import PART

OVERFLOWS = 80.0  # exp of much more than this overflows float32
LARGE = 40.0  # |x| up to which exp(x) needs no maximum taken off: no sum leaves float32, exp2(x log2(e)) has 5 digits
FAR = 0.5  # |c| up to which the polynomial holds
LOG2_E = math.log2(math.e)


def divergence(x: Tensor, y: Tensor, largest: float = math.inf, farthest: float = math.inf) -> float | None:
    """The divergence; None if a value is not finite, because the softmax of infinite scores is not defined.

    No |x| is above `largest` and no |y - x| above `farthest`, if they are known: then it takes less time.
    """
    if not (math.isfinite(largest + farthest) or (_all_finite(x) and _all_finite(y))):
        return None
    if x.ndim == 0:
        return 0.0
    return sum(_rows(p, q, largest, farthest) for p, q in _columns(x, y)) / x.numel()


def _rows(x: Tensor, y: Tensor, largest: float, farthest: float) -> float:
    """Sum over the distributions of a part, with a relative error of at most 1e-5 in float32."""
    if x.dtype in (torch.float16, torch.bfloat16):
        x, y = x.float(), y.float()
    if largest <= LARGE:  # torch's exp2 takes a third of its exp; rounding of the product costs 7e-8 |x|
        weights = (x * LOG2_E).exp2_()
        norms = weights.sum(1)
    else:
        weights, norms = x.softmax(1), torch.ones_like(x[:, 0])
    change = y - x
    mean = (weights * change).sum(1).div_(norms)
    change -= mean.unsqueeze(1)
    if 2.0 * farthest > FAR:
        low, high = torch.stack(torch.aminmax(change)).tolist()
        if high > OVERFLOWS:
            rows = torch.logsumexp(y.double(), 1) - torch.logsumexp(x.double(), 1) - mean.double()
            return float(rows.sum())
        farthest = max(-low, high) / 2.0
    grown = _growth(change) if 2.0 * farthest <= FAR else change.expm1_()  # E_p[change] is 0
    return float(grown.mul_(weights).sum(1).div_(norms).log1p_().sum(dtype=torch.float64))


def _growth(c: Tensor) -> Tensor:
    """exp(c) - 1 - c for |c| <= FAR, to a relative error of 8e-7.

    This is c^2 times the polynomial of degree 4 with the least relative error (found by iterated least squares), in
    factors that are sums of positive numbers.
    """
    first, second = c + 3.575373839134025, c - 0.558621317067716
    first.square_().add_(5.538272075674466)
    second.square_().add_(19.300535266406772)
    return first.mul_(second).mul_(c).mul_(c).mul_(0.00139146492148665)


def _all_finite(tensor: Tensor) -> bool:
    return math.isfinite(float(tensor.sum())) or bool(tensor.isfinite().all())  # a sum is ten times faster


def _columns(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of parts [k, size, columns] with the distributions along axis 1, at most PART values each: k whole samples,
    or some columns of one sample. The axis of size `size` is dim 1 of x and y, the last dim below 3-d.
    """
    if x.ndim > 2:
        a, b = (t.reshape(t.shape[0], t.shape[1], -1) for t in (x, y))
    else:
        a, b = (t.reshape(-1, t.shape[-1]).t()[None] for t in (x, y))
    sample = a.shape[1] * a.shape[2]
    samples, columns = max(1, PART // max(sample, 1)), max(1, PART // max(a.shape[1], 1))
    for i in range(0, a.shape[0], samples):
        p, q = a[i : i + samples], b[i : i + samples]
        if columns >= a.shape[2]:
            yield p, q
            continue
        for j in range(0, a.shape[2], columns):
            yield p[:, :, j : j + columns], q[:, :, j : j + columns]
