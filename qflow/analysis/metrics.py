"""Distances between a float output and a quantized one, a number a sample.

The plugin's formulas, x float and y quantized, both flattened per sample:

    Cosine  <x, y> / (|x| |y|)                 MSE   mean (x - y)^2          L1  mean |x - y|
    KL      mean of p (log p - log q), p and q the softmax of x and y over dim 1 (last dim below 3-d), float64
    SQNR    20 log10(|x| / |x - y|) dB, infinite where equal                 Atol  max |x - y|
"""

from __future__ import annotations

import torch
from torch import Tensor

from qflow.core.errors import ConfigError
from qflow.core.settings import COMPARISONS

SMALLEST_IS_WORST = frozenset({"Cosine", "SQNR"})


def distance(metric: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance for each sample: x, y [B, ...] -> float64 [B]. Raises ConfigError for an unknown metric."""
    if metric not in COMPARISONS:
        raise ConfigError(f"A comparison metric is one of {', '.join(COMPARISONS)}, but got {metric!r}.")
    a, b = x.double().reshape(len(x), -1), y.double().reshape(len(y), -1)
    if metric == "Cosine":
        same = (a == b).all(1)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-30)
        return torch.where(same, torch.ones_like(cosine), cosine)
    if metric == "MSE":
        return (a - b).square().mean(1)
    if metric == "L1":
        return (a - b).abs().mean(1)
    if metric == "Atol":
        return (a - b).abs().amax(1)
    if metric == "SQNR":
        ratio = 20.0 * torch.log10(a.norm(dim=1) / (a - b).norm(dim=1))
        return torch.where((a == b).all(1), torch.full_like(ratio, torch.inf), ratio)
    dim = 1 if x.ndim > 2 else -1
    log_p, log_q = x.double().log_softmax(dim), y.double().log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).reshape(len(x), -1).mean(1)


def worst_first(metric: str, values: Tensor) -> Tensor:
    """Indices from worst to best; ties by index."""
    key = values if metric in SMALLEST_IS_WORST else -values
    return torch.sort(key, stable=True).indices
