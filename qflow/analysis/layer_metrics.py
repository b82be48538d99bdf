"""One operator's float and calibrated values compared: the columns of the guide's layer table.

The plugin's formulas over the whole tensor, x float and y calibrated (KL: over dim 1, last dim below 3-d). Sums are
float64 over parts of the tensor, so that a feature map of any size takes little beyond itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PART = 1 << 16  # values of a part: what a core keeps in its cache

EMPTY = (
    ["Cosine", "MSE", "L1", "KL", "SQNR", "Atol", "Rtol"]
    + [f"{model}_model_{what}" for what in ("min", "max", "mean", "var") for model in ("base", "analy")]
    + ["error"]
)


def compare(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """All columns for two tensors of one shape; None for each where they are not floating or differ in shape."""
    if x.shape != y.shape or not x.is_floating_point() or not x.numel():
        return dict.fromkeys(EMPTY)
    a, b = x.reshape(-1), y.reshape(-1)
    n = a.numel()
    sums = torch.zeros(7, dtype=torch.float64)
    atol = rtol = 0.0
    for p, q in zip(torch.split(a, PART), torch.split(b, PART), strict=True):
        p64, q64 = p.double(), q.double()
        d = p64 - q64
        sums += torch.stack(
            [p64.sum(), q64.sum(), p64.dot(p64), q64.dot(q64), p64.dot(q64), d.dot(d), d.abs().sum()]
        ).cpu()
        atol = max(atol, float(d.abs().max()))
        rtol = max(rtol, float(torch.nan_to_num(d / p64, 0.0).abs().max()))
    sx, sy, xx, yy, xy, dd, l1 = sums.tolist()
    mx, my = sx / n, sy / n
    one_less = max(n - 1, 1)
    norms = math.sqrt(xx) * math.sqrt(yy) if math.isfinite(xx) and math.isfinite(yy) else math.nan
    found: dict[str, float | None] = {
        "Cosine": 1.0 if dd == 0.0 else (xy / norms if norms else 0.0),
        "MSE": dd / n,
        "L1": l1 / n,
        "KL": divergence(x, y),
        "SQNR": math.inf if dd == 0.0 else (10.0 * math.log10(xx / dd) if xx > 0 else -math.inf),
        "Atol": atol,
        "Rtol": rtol,
        "base_model_mean": mx,
        "analy_model_mean": my,
        "base_model_var": max(xx - n * mx * mx, 0.0) / one_less,
        "analy_model_var": max(yy - n * my * my, 0.0) / one_less,
        "error": math.sqrt(dd / xx) if xx > 0 else (0.0 if dd == 0.0 else math.inf),
    }
    for model, tensor in (("base", a), ("analy", b)):
        low, high = torch.aminmax(tensor)
        found[f"{model}_model_min"], found[f"{model}_model_max"] = float(low), float(high)
    return {key: _number(value) for key, value in found.items()}


def _number(value: float | None) -> float | None:
    return None if value is not None and math.isnan(value) else value


def divergence(x: Tensor, y: Tensor) -> float:
    """KL divergence as torch's KLDivLoss has it: mean over all elements of p (log p - log q).

    A row's sum is E_p[x - y] - (log sum exp x - log sum exp y): two exponentials an element instead of three.
    """
    if x.ndim == 0:
        return 0.0
    total = 0.0
    for p, q in _columns(x, y):
        p64, q64 = p.double(), q.double()
        top, low = p64.amax(0), q64.amax(0)
        weights = (p64 - top).exp_()
        mass = weights.sum(0)
        rows = (weights.mul_(p64 - q64)).sum(0) / mass - (mass.log() + top)
        total += float((rows + (q64 - low).exp_().sum(0).log_() + low).sum())
    return total / x.numel()


def _columns(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Distributions along axis 0, some columns at a time: over dim 1 of a sample, over the last dim below 3-d."""
    if x.ndim > 2:
        pairs = [(a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)) for a, b in zip(x, y, strict=True)]
    else:
        pairs = [(x.reshape(-1, x.shape[-1]).t(), y.reshape(-1, y.shape[-1]).t())]
    for a, b in pairs:
        size = max(1, PART // a.shape[0])
        yield from zip(torch.split(a, size, 1), torch.split(b, size, 1), strict=True)


def relative_error(x: Tensor, y: Tensor) -> float | None:
    """|x - y| / |x|, Euclidean norms; None where they cannot be compared."""
    if x.shape != y.shape or not x.is_floating_point():
        return None
    dd = xx = 0.0
    for p, q in zip(torch.split(x.reshape(-1), PART), torch.split(y.reshape(-1), PART), strict=True):
        p64 = p.double()
        d = p64 - q
        dd, xx = dd + float(d.dot(d)), xx + float(p64.dot(p64))
    return _number(math.sqrt(dd / xx) if xx > 0 else (0.0 if dd == 0.0 else math.inf))
