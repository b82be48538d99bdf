"""Checks of single settings, with one message each.

A field that has a limit says so in its type, `Annotated[int, Between(1, 4096)]`: `check_limits` holds a record to the
limits of its fields, and the JSON schema of a command's settings is made from them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

LARGEST_SEED = 2**32 - 1
"""NumPy, which Optuna's samplers draw from, takes no larger one."""
LARGEST = 1e12
"""Of a number without a smaller limit of its own: no amount, rate or time comes near it, and it stays finite."""
LARGEST_INPUT = 2**30
"""Numbers of an input: 4 GiB in float32."""


@dataclass(frozen=True)
class Between:
    """A limit of a number: from `low` to `high`, both included."""

    low: float
    high: float

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError for a number beyond the limit."""
        within(name, value, self.low, self.high)

    def keywords(self) -> dict[str, Any]:
        """Return the limit in the words of JSON Schema."""
        ends = {"minimum": self.low, "maximum": self.high}
        return {word: end for word, end in ends.items() if math.isfinite(end)}


@dataclass(frozen=True)
class Above:
    """A limit of a number: larger than `low`, and at most `high`."""

    low: float
    high: float = LARGEST

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError for a number beyond the limit."""
        if not self.low < value < math.inf:
            raise ConfigError(f"{name} is a number above {_shown(self.low)}, but got {_shown(value)}.")
        _at_most(name, value, self.high)

    def keywords(self) -> dict[str, Any]:
        """Return the limit in the words of JSON Schema."""
        return {"exclusiveMinimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class AtLeast:
    """A limit of a number: from `low` to `high`."""

    low: float
    high: float = LARGEST

    def check(self, name: str, value: float) -> None:
        """Raise ConfigError for a number beyond the limit."""
        if not self.low <= value < math.inf:
            raise ConfigError(f"{name} is a number of at least {_shown(self.low)}, but got {_shown(value)}.")
        _at_most(name, value, self.high)

    def keywords(self) -> dict[str, Any]:
        """Return the limit in the words of JSON Schema."""
        return {"minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class OneOf:
    """A limit of a text: one of `values`."""

    values: tuple[str, ...]

    def check(self, name: str, value: str) -> None:
        """Raise ConfigError for another text."""
        one_of(name, value, self.values)

    def keywords(self) -> dict[str, Any]:
        """Return the limit in the words of JSON Schema."""
        return {"enum": list(self.values)}


def check_limits(record: object, prefix: str, kind: type | None = None) -> None:
    """Raise ConfigError for the first field of a record that is beyond the limit of its type.

    `prefix` is the group of the fields, and `kind` the class that states the limits where it is not the record's own.
    """
    for name, hint in _limited(kind or type(record)).items():
        check_value(f"{prefix}.{name}", getattr(record, name), hint)


@functools.cache
def _limited(kind: type) -> dict[str, Any]:
    """Return the types of the fields that have limits."""
    return {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if "Annotated" in str(hint)}


def check_value(name: str, value: Any, hint: Any) -> None:
    """Hold a value, each item of a list and each value of a mapping to the limits of its type. Raises ConfigError."""
    arguments = get_args(hint)
    if value is None:  # the type says whether it may be
        return
    if get_origin(hint) is Annotated:
        for limit in arguments[1:]:
            limit.check(name, value)
    elif get_origin(hint) in (Union, UnionType):
        check_value(name, value, arguments[0])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_value(f"{name}.{key}", item, arguments[1])
    else:
        for item in value:
            check_value(name, item, arguments[0])


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`; the nearest is named."""
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(allowed)}, but got {value!r}.{did_you_mean(value, allowed)}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `value` lies between `low` and `high`, both included."""
    if not low <= value <= high:  # NaN fails too
        raise ConfigError(f"{name} lies between {_shown(low)} and {_shown(high)}, but got {_shown(value)}.")


def _at_most(name: str, value: float, high: float) -> None:
    if value > high:
        raise ConfigError(f"{name} is at most {_shown(high)}, but got {_shown(value)}.")


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
    if isinstance(value, int):
        return str(value) if abs(value) < 10**40 else "one of more than 40 digits"
    return f"{value:g}"
