"""Checks of single settings, with one message each."""

from __future__ import annotations

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`; the nearest is named."""
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(allowed)}, but got {value!r}.{did_you_mean(value, allowed)}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `value` lies between `low` and `high`, both included."""
    if not low <= value <= high:  # NaN fails too
        raise ConfigError(f"{name} lies between {low:g} and {high:g}, but got {value:g}.")
