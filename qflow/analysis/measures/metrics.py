"""Distances between a float output and a quantized one: one number per sample.

The formulas are the plugin's, with x float and y quantized, both flattened per sample:

    Cosine  <x, y> / (|x| |y|)                 MSE   mean (x - y)^2          L1  mean |x - y|
    KL      mean of p (log p - log q), p and q the softmax of x and y over dim 1 (last dim below 3-d), float64
    SQNR    20 log10(|x| / |x - y|) dB, infinite where equal                 Atol  max |x - y|
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.core.errors import ConfigError
from qflow.core.settings import COMPARISONS

SMALLEST_IS_WORST = frozenset({"Cosine", "SQNR"})
CUSTOM = "custom"
ORDERS = ("ascending", "descending")
WORST = torch.finfo(torch.float64).max


def distance(metric: str, x: Tensor, y: Tensor) -> Tensor:
    """Distance for each sample: x, y [B, ...] -> float64 [B]. Raises ConfigError for an unknown metric."""
    if metric not in COMPARISONS:
        raise ConfigError(f"A comparison metric is one of {', '.join(COMPARISONS)}, but got {metric!r}.")
    if metric == "KL":
        return _kl(x, y)
    a, b = x.double().reshape(len(x), -1), y.double().reshape(len(y), -1)
    return _FORMULAS[metric](a, b, a - b)


def _cosine(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=1e-30)
    return torch.where((a == b).all(1), torch.ones_like(cosine), cosine)


def _sqnr(a: Tensor, b: Tensor, d: Tensor) -> Tensor:
    ratio = 20.0 * torch.log10(a.norm(dim=1) / d.norm(dim=1))
    return torch.where((a == b).all(1), torch.full_like(ratio, torch.inf), ratio)


# Each takes x, y and x - y, float64 [B, values].
_FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "Cosine": _cosine,
    "MSE": lambda a, b, d: d.square().mean(1),
    "L1": lambda a, b, d: d.abs().mean(1),
    "SQNR": _sqnr,
    "Atol": lambda a, b, d: d.abs().amax(1),
}


def _kl(x: Tensor, y: Tensor) -> Tensor:
    dim = 1 if x.ndim > 2 else -1
    log_p, log_q = x.double().log_softmax(dim), y.double().log_softmax(dim)
    return (log_p.exp() * (log_p - log_q)).reshape(len(x), -1).mean(1)


def worst_first(metric: str, values: Tensor) -> Tensor:
    """Indices from worst to best; ties by index."""
    key = values if metric in SMALLEST_IS_WORST else -values
    return torch.sort(key, stable=True).indices


@dataclass(frozen=True)
class Custom:
    """The user's own metric: `function(x, y) -> Tensor[B]` on outputs x, y [B, ...], and its direction.

    `order` runs from bad to good, as in the plugin: `ascending` if the smallest value is the worst.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    order: str

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ConfigError(
                f"A custom metric's order, from bad to good, is one of {', '.join(ORDERS)}, but got {self.order!r}."
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The metric of each sample: float64 [B]. Raises ConfigError unless the function gives one number a sample."""
        value = torch.as_tensor(self.function(x, y), dtype=torch.float64, device=x.device).detach()
        if value.numel() != len(x) or value.ndim > 1:
            raise ConfigError(
                f"A custom metric gives one number a sample, [{len(x)}], but got {list(value.shape)}. "
                "Reduce over all dims but the first."
            )
        return value.reshape(-1)


def custom_metric(metric: str, function: Callable[[Tensor, Tensor], Any] | None, order: str | None) -> Custom | None:
    """The user's metric, or None if there is none; the function gets one sample at a time, as in the plugin."""
    if function is None and order is None and str(metric).casefold() != CUSTOM:
        return None
    if not callable(function) or order is None:
        raise ConfigError(
            "A custom metric has custom_metric_func and custom_metric_order_seq (ascending or descending, from bad to "
            f"good), but got {function!r} and {order!r}. Give both."
        )

    def each(x: Tensor, y: Tensor) -> Tensor:
        values = [_number(function(a, b)) for a, b in zip(x[:, None], y[:, None], strict=True)]
        if any(value.numel() != 1 for value in values):
            raise ConfigError(f"A custom metric gives one number a sample, but got {list(values[0].shape)}. Reduce it.")
        return torch.stack([value.reshape(()) for value in values])

    return Custom(each, order)


def _number(value: Any) -> Tensor:
    try:
        return torch.as_tensor(value).double()
    except (TypeError, ValueError, RuntimeError) as error:
        got = type(value).__name__
        raise ConfigError(f"A custom metric gives one number a sample, but got {got}. Return a float.") from error


def metric_names(custom: Custom | None = None) -> tuple[str, ...]:
    """Names of all metrics, the user's last."""
    return COMPARISONS if custom is None else (*COMPARISONS, CUSTOM)


def distances(x: Tensor, y: Tensor, custom: Custom | None = None) -> Tensor:
    """All metrics at once: x, y [B, ...] -> float64 [metrics, B], in the order of `metric_names`."""
    a, b = x.double().reshape(len(x), -1), y.double().reshape(len(y), -1)
    d = a - b
    found = [_kl(x, y) if metric == "KL" else _FORMULAS[metric](a, b, d) for metric in COMPARISONS]
    return torch.stack(found if custom is None else [*found, custom(x, y)])


def smallest_is_worst(metric: str, custom: Custom | None = None) -> bool:
    """True if the smallest value of a metric is the worst, the user's own metric included."""
    return metric in SMALLEST_IS_WORST or (metric == CUSTOM and custom is not None and custom.order == "ascending")


def badness(metric: str, values: Tensor, custom: Custom | None = None) -> Tensor:
    """`values` of a metric converted so that larger is worse and 0 is equal: 1 - Cosine, |noise| / |signal| for SQNR.

    The other metrics have this form already. Of the user's own metric only the sign changes, where needed; its value
    for equal outputs is not known. NaN stays NaN.
    """
    if metric == "Cosine":
        return 1.0 - values
    if metric == "SQNR":
        return 10.0 ** (-values / 20.0)
    return -values if smallest_is_worst(metric, custom) else values


def worst_key(bad: Tensor) -> Tensor:
    """Sort key of badness: NaN ranks above infinity, and infinity above all numbers."""
    return bad.nan_to_num(nan=torch.inf, posinf=WORST, neginf=-WORST)
