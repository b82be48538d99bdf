"""Checks of single settings, with one message each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

LARGEST_SEED = 2**32 - 1
"""NumPy, which Optuna's samplers draw from, takes no larger one."""
LARGEST_INPUT = 2**30
"""Numbers of an input: 4 GiB in float32."""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`; the nearest is named."""
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(allowed)}, but got {value!r}.{did_you_mean(value, allowed)}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `value` lies between `low` and `high`, both included."""
    if not low <= value <= high:  # NaN fails too
        raise ConfigError(f"{name} lies between {_shown(low)} and {_shown(high)}, but got {_shown(value)}.")


def check_shape(name: str, shape: object) -> None:
    """Raise ConfigError unless `shape` is None, the shape of an input, or such shapes by the names of inputs."""
    shapes = list(shape.values()) if isinstance(shape, Mapping) else [shape]
    if shape is None or (shapes and all(map(_is_shape, shapes))):
        return
    raise ConfigError(
        f"{name} is a list of whole numbers above 0, or such lists by the names of inputs, for at most {LARGEST_INPUT} "
        f"numbers, but got {str(shape)[:60]}. Write [1,3,224,224], or null for the shape of the data."
    )


def _is_shape(shape: object) -> bool:
    if not isinstance(shape, (list, tuple)) or not shape:
        return False
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in shape)
    return whole and math.prod(shape) <= LARGEST_INPUT


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
