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
OVERFLOWS = 80.0  # exponents beyond it leave float32

EMPTY = (
    ["Cosine", "MSE", "L1", "KL", "SQNR", "Atol", "Rtol"]
    + [f"{model}_model_{what}" for what in ("min", "max", "mean", "var") for model in ("base", "analy")]
    + ["error"]
)


def compare(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """All columns for two tensors of one shape; None for each where they are not floating or differ in shape.

    The same infinity in both (a mask), or NaN in float, is no difference and enters nothing else; a value that is
    finite in one only is an infinite one. Rtol is computed in float32, where division by zero gives its largest number,
    as in the plugin.
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
        worst = math.inf if n else None  # nothing finite to compare, or a value that one of them has lost
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
    """Both without the places where they are the same infinity or p, the float value, is NaN.

    Another value that is not finite becomes infinite.
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
    """Largest magnitude; what is no number counts as nothing, an infinite one as the largest there is."""
    largest = float(ratios.abs().max())
    return largest if math.isfinite(largest) else float(torch.nan_to_num(ratios, 0.0).abs().max())


def divergence(x: Tensor, y: Tensor) -> float | None:
    """KL divergence as torch's KLDivLoss has it: mean over all elements of p (log p - log q).

    With d = y - x and m its mean under p, a row's sum is log E_p[exp(d - m)]: two exponentials an element, and no
    difference of large numbers, so that float32 keeps all but the last digits of a small divergence.
    """
    if x.ndim == 0:
        return 0.0
    if not _all_finite(x) or not _all_finite(y):
        return None  # a distribution over infinite scores is none
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
    """Distributions along axis 1 of [k, size, columns], at most PART values at a time: over dim 1 of k samples, or of
    one and some of its columns; over the last dim below 3-d.
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
    """|x - y| / |x|, Euclidean norms; None where they cannot be compared."""
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
