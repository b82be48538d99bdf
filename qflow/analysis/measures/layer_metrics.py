"""Compares the float and the calibrated values of one operator: the columns of the guide's layer table.

The formulas are the plugin's, over the whole tensor, with x float and y calibrated (KL: over dim 1, over the last dim
below 3-d). Sums run in float64 over parts of the tensor, so that a large feature map needs little extra memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

PART = 1 << 16  # values in one part: they fit into the cache of a core
OVERFLOWS = 80.0  # exp of much more than this overflows float32

EMPTY = (
    ["Cosine", "MSE", "L1", "KL", "SQNR", "Atol", "Rtol"]
    + [f"{model}_model_{what}" for what in ("min", "max", "mean", "var") for model in ("base", "analy")]
    + ["error"]
)


def compare(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """All columns for two tensors of one shape; each is None if they are not floating or differ in shape.

    Positions where both hold the same infinity (a mask), or where float holds NaN, count as equal and are left out of
    all sums; a value that is finite in only one of them counts as an infinite difference. Rtol is computed in float32,
    where division by zero gives the largest float32 number, as in the plugin.
    """
    if x.shape != y.shape or not x.is_floating_point() or not x.numel():
        return dict.fromkeys(EMPTY)
    a, b = x.reshape(-1), y.reshape(-1)
    ends = {f"{m}_model_{e}": v for m, t in (("base", a), ("analy", b)) for e, v in _range(t).items()}
    sums = torch.zeros(8, dtype=torch.float64)
    atol = rtol = 0.0
    for p, q in zip(torch.split(a, PART), torch.split(b, PART), strict=True):
        p64, q64 = _finite(p.double(), q.double())
        if not p64.numel():
            continue
        d = p64 - q64
        counts = torch.tensor(float(p64.numel()), dtype=torch.float64, device=d.device)
        products = [p64.dot(p64), q64.dot(q64), p64.dot(q64), d.dot(d)]
        sums += torch.stack([p64.sum(), q64.sum(), *products, d.abs().sum(), counts]).cpu()
        atol = max(atol, float(d.abs().max()))
        rtol = max(rtol, _largest(d.float() / p64.float()))
    sx, sy, xx, yy, xy, dd, l1, n = sums.tolist()
    if not n or not math.isfinite(dd):
        worst = math.inf if n else None  # inf: a value is finite in only one of them; None: there is none to compare
        return {**dict.fromkeys(EMPTY), "Atol": worst, "L1": worst, "MSE": worst, "error": worst, **ends}
    norms = math.sqrt(xx) * math.sqrt(yy)
    return {
        "Cosine": 1.0 if dd == 0.0 else (xy / norms if norms else 0.0),
        "MSE": dd / n,
        "L1": l1 / n,
        "KL": divergence(x, y),
        "SQNR": math.inf if dd == 0.0 else (10.0 * math.log10(xx / dd) if xx > 0 else -math.inf),
        "Atol": atol,
        "Rtol": rtol,
        "base_model_mean": sx / n,
        "analy_model_mean": sy / n,
        "base_model_var": max(xx - sx * sx / n, 0.0) / max(n - 1, 1),
        "analy_model_var": max(yy - sy * sy / n, 0.0) / max(n - 1, 1),
        "error": math.sqrt(dd / xx) if xx > 0 else (0.0 if dd == 0.0 else math.inf),
        **ends,
    }


def _range(tensor: Tensor) -> dict[str, float | None]:
    low, high = torch.aminmax(tensor)
    return {"min": _number(float(low)), "max": _number(float(high))}


def _finite(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the positions where they hold the same infinity or where p, the float value, is NaN.

    At other positions that are not finite in both of them, the difference becomes infinite.
    """
    if math.isfinite(float(p.sum())) and math.isfinite(float(q.sum())):
        return p, q
    kept = ~(((p == q) & p.isinf()) | p.isnan())
    p, q = p[kept], q[kept]
    lost = ~(p.isfinite() & q.isfinite())
    return p.masked_fill(lost, torch.inf), q.masked_fill(lost, 0.0)


def _number(value: float | None) -> float | None:
    return None if value is not None and math.isnan(value) else value


def _largest(ratios: Tensor) -> float:
    """Largest magnitude; NaN counts as 0, infinity as the largest float32 number."""
    largest = float(ratios.abs().max())
    return largest if math.isfinite(largest) else float(torch.nan_to_num(ratios, 0.0).abs().max())


def divergence(x: Tensor, y: Tensor) -> float | None:
    """KL divergence as in torch's KLDivLoss: mean over all elements of p (log p - log q).

    With d = y - x and m its mean under p, the sum over a row is log E_p[exp(d - m)]. This takes two exponentials per
    element and no difference of large numbers, so that float32 loses only the last digits of a small divergence.
    """
    if x.ndim == 0:
        return 0.0
    if not _all_finite(x) or not _all_finite(y):
        return None  # the softmax of infinite scores is not defined
    total = 0.0
    for p, q in _columns(x, y):
        weights = (p - p.amax(1, keepdim=True)).exp_()
        weights /= weights.sum(1, keepdim=True)
        change = q - p
        mean = (weights * change).sum(1, keepdim=True)
        change -= mean
        if float(change.max()) > OVERFLOWS:
            rows = torch.logsumexp(q.double(), 1) - torch.logsumexp(p.double(), 1) - mean.double()[:, 0]
        else:
            rows = change.expm1_().mul_(weights).sum(1).log1p_()
        total += float(rows.sum(dtype=torch.float64))
    return total / x.numel()


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
    for p, q in zip(torch.split(a, samples), torch.split(b, samples), strict=True):
        yield from zip(torch.split(p, columns, 2), torch.split(q, columns, 2), strict=True)


def relative_error(x: Tensor, y: Tensor) -> float | None:
    """|x - y| / |x|, Euclidean norms; None if the tensors cannot be compared."""
    if x.shape != y.shape or not x.is_floating_point():
        return None
    dd = xx = 0.0
    for p, q in zip(torch.split(x.reshape(-1), PART), torch.split(y.reshape(-1), PART), strict=True):
        p64, q64 = _finite(p.double(), q.double())
        d = p64 - q64
        dd, xx = dd + float(d.dot(d)), xx + float(p64.dot(p64))
    if not math.isfinite(dd):
        return math.inf
    return _number(math.sqrt(dd / xx) if xx > 0 else (0.0 if dd == 0.0 else math.inf))
