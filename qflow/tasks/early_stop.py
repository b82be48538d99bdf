"""Decides when an evaluation may end before its last sample, by the bounds that a metric states for its scores."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from qflow.core.errors import ConfigError

EPS = 1e-6  # tolerance relative to the larger bound: a float32 score of 1 may be computed as 1.0000001


def bounds_of(metric: Any) -> tuple[float, float]:
    """(lowest, highest) score of a sample. Raises ConfigError for a metric that cannot end an evaluation early."""
    if hasattr(metric, "update") and hasattr(metric, "compute"):
        found: Any = "one that is computed at the end"
    else:
        found = getattr(metric, "bounds", None)
        numbers = isinstance(found, (tuple, list)) and all(isinstance(v, (int, float)) for v in found)
        if numbers and len(found) == 2 and -math.inf < found[0] < found[1] < math.inf:
            return float(found[0]), float(found[1])
        found = "no bounds" if found is None else f"bounds {found!r}"
    raise ConfigError(
        "search.early_stop needs a metric with a score a sample and its bounds (lowest, highest), two finite numbers, "
        f"but got {found}. Give the metric bounds, or leave search.early_stop out."
    )


def require_within(bounds: tuple[float, float], scores: Tensor) -> None:
    """Raise ConfigError for scores outside the bounds: they would end an evaluation wrongly."""
    slack = EPS * max(map(abs, bounds))
    low, high = float(scores.min()), float(scores.max())
    if not (bounds[0] - slack <= low and high <= bounds[1] + slack):
        raise ConfigError(
            f"A metric's scores lie within its bounds {bounds}, but got {low:.9g} to {high:.9g}. Correct the bounds of "
            "task.metric."
        )


def out_of_reach(
    bounds: tuple[float, float], direction: str, total: float, count: int, samples: int, least: float
) -> float | None:
    """The metric if all remaining samples score worst, once even the best scores cannot reach `least`; else None.

    `total` is the sum of the first `count` of `samples` scores.
    """
    if count >= samples:
        return None
    low, high = ((total + (samples - count) * bound) / samples for bound in bounds)
    if direction == "maximize":
        return low if high < least else None
    return high if low > least else None
