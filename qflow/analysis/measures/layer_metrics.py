"""Compares the float and the calibrated values of one operator: the columns of the guide's layer table.

The formulas are the plugin's, over the whole tensor, with x float and y calibrated (KL: over dim 1, over the last dim
below 3-d). Sums run over parts of the tensor, so that a large feature map needs little extra memory: in float32
(pair_sums.py), in float64 where float32 cannot hold them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qflow.analysis.measures.kl_divergence import divergence
from qflow.analysis.measures.pair_sums import SMALL, in_memory_order, pair_sums, parts

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
    s = pair_sums(x, y)
    if s is None:
        return _in_double(x, y)
    columns: dict[str, float | None] = {
        **_averages(s.n, s.xx, s.dd, s.l1),
        "Cosine": s.cosine,
        "KL": divergence(x, y, magnitude(*s.x_ends), s.atol) if s.atol else 0.0,
        "Atol": s.atol,
        "Rtol": s.rtol,
        "base_model_mean": s.x / s.n,
        "analy_model_mean": (s.x + s.d) / s.n,
        "base_model_var": s.x_var,
        "analy_model_var": s.y_var,
    }
    for model, ends in (("base", s.x_ends), ("analy", s.y_ends)):
        columns.update({f"{model}_model_min": ends[0], f"{model}_model_max": ends[1]})
    return columns


def _averages(n: float, xx: float, dd: float, l1: float) -> dict[str, float | None]:
    return {
        "MSE": dd / n,
        "L1": l1 / n,
        "SQNR": math.inf if dd == 0.0 else (10.0 * math.log10(xx / dd) if xx > 0 else -math.inf),
        "error": _ratio(xx, dd),
    }


def magnitude(low: float | None, high: float | None) -> float:
    """The largest |value| between two ends; inf if they are unknown."""
    return math.inf if low is None or high is None else max(-low, high)


def _ratio(xx: float, dd: float) -> float:
    return math.sqrt(dd / xx) if xx > 0 else (0.0 if dd == 0.0 else math.inf)


def _in_double(x: Tensor, y: Tensor) -> dict[str, float | None]:
    """`compare` in float64, for masks, infinities, NaN, and values whose squares leave the range of float32."""
    a, b = x.reshape(-1), y.reshape(-1)
    ends = {f"{m}_model_{e}": v for m, t in (("base", a), ("analy", b)) for e, v in _range(t).items()}
    sums = torch.zeros(8, dtype=torch.float64)
    atol = rtol = 0.0
    for p, q in parts(a, b):
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
        **_averages(n, xx, dd, l1),
        "Cosine": 1.0 if dd == 0.0 else (xy / norms if norms else 0.0),
        "KL": divergence(x, y, magnitude(ends["base_model_min"], ends["base_model_max"]), atol),
        "Atol": atol,
        "Rtol": rtol,
        "base_model_mean": sx / n,
        "analy_model_mean": sy / n,
        "base_model_var": max(xx - sx * sx / n, 0.0) / max(n - 1, 1),
        "analy_model_var": max(yy - sy * sy / n, 0.0) / max(n - 1, 1),
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


def relative_error(x: Tensor, y: Tensor) -> float | None:
    """|x - y| / |x|, Euclidean norms; None if the tensors cannot be compared."""
    if x.shape != y.shape or not x.is_floating_point():
        return None
    dd = xx = 0.0
    if x.dtype == y.dtype == torch.float32:
        found = []
        for p, q in parts(*in_memory_order(x, y)):
            d = q - p
            found.append(torch.stack([d.square_().sum(), torch.mul(p, p, out=d).sum()]))
        dd, xx = torch.stack(found).sum(0, dtype=torch.float64).tolist() if found else (0.0, 0.0)
        if math.isfinite(dd + xx) and _squares_fit(dd, xx, x.numel()):
            return _ratio(xx, dd)
        dd = xx = 0.0
    for p, q in parts(x.reshape(-1), y.reshape(-1)):
        p64, q64 = _finite(p.double(), q.double())
        d = p64 - q64
        dd, xx = dd + float(d.dot(d)), xx + float(p64.dot(p64))
    return _number(_ratio(xx, dd)) if math.isfinite(dd) else math.inf


def _squares_fit(dd: float, xx: float, n: int) -> bool:
    """True unless squares may have become too small for float32; equal tensors have sums of exact zeros or none."""
    return min(dd, xx) > n * SMALL**2
