"""The search space as data: which values each configuration key may take.

A `Space` maps dotted configuration keys to domains. The three kinds of domain match Hydra's sweep syntax:
`choice(a,b)`, `interval(low, high)` (also on a log scale or of integers) and `range(start, stop, step)`.
A domain may have conditions: its key is then searched only where other keys of the space have certain values. Where the
conditions do not hold, a point lacks the key, so that two points that would differ only in this key are the same point.
This module uses the standard library only, so that a space can be hashed, stored and compared without a sampler.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias, TypeGuard

from qflow.core import record
from qflow.core.errors import ConfigError

Scalar: TypeAlias = str | int | float | bool | None
Values: TypeAlias = Mapping[str, Scalar]  # one point: configuration key -> value
NOTHING: Values = MappingProxyType({})


def as_proposed(_: Values) -> Values:
    """Leave a proposal of the sampler as it is: no values are added."""
    return NOTHING


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_numbers(kind: str, **values: object) -> None:
    for name, value in values.items():
        if not _number(value):
            raise ConfigError(f"{kind} takes finite numbers, but got {value!r} for {name}. Correct the space.")


@dataclass(frozen=True)
class Condition:
    """The condition that `key`, another key of the space, has a value in `allowed`; false if `key` does not apply."""

    key: str
    allowed: Domain

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values for JSON."""
        return {"key": self.key, "allowed": self.allowed.to_dict()}


def _conditions(domain: Domain) -> dict[str, Any]:
    """Return `when` for JSON, or nothing if it is empty.

    The digests of spaces without conditions thus stay the same as before there were conditions.
    """
    return {"when": [condition.to_dict() for condition in domain.when]} if domain.when else {}


@dataclass(frozen=True)
class Choice:
    """A set of unordered values. Raises ConfigError if it is empty or a value is repeated or not scalar."""

    values: tuple[Scalar, ...]
    when: tuple[Condition, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        if not self.values:
            raise ConfigError("Choice takes at least one value, but got none. Leave the key out of the space.")
        for value in self.values:
            if not (value is None or isinstance(value, (str, bool)) or _number(value)):
                raise ConfigError(f"Choice takes text, numbers, booleans or null, but got {value!r}.")
        if len({_key(v) for v in self.values}) < len(self.values):
            raise ConfigError(f"Choice takes each value once, but got {list(self.values)}. Drop the repeats.")

    def contains(self, value: Scalar) -> bool:
        """Return whether `value` is one of the choices. True does not equal 1."""
        return _key(value) in {_key(v) for v in self.values}

    def normal(self, value: Scalar) -> Scalar:
        """Return the choice that `value` equals, or `value` itself if there is none."""
        return next((v for v in self.values if _key(v) == _key(value)), value)

    def count(self) -> int:
        """Return the number of values."""
        return len(self.values)

    def points(self) -> tuple[Scalar, ...]:
        """Return every value."""
        return self.values

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields as plain values for JSON."""
        return {"kind": "choice", "values": list(self.values), **_conditions(self)}


@dataclass(frozen=True)
class Interval:
    """All numbers from `low` to `high`, both inclusive; with `log` samplers draw uniformly in log(value)."""

    low: float
    high: float
    log: bool = False
    integer: bool = False
    when: tuple[Condition, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        _require_numbers("Interval", low=self.low, high=self.high)
        if self.low > self.high:
            raise ConfigError(f"Interval needs low <= high, but got {self.low} and {self.high}. Swap them.")
        if self.log and self.low <= 0:
            raise ConfigError(f"A log Interval needs low > 0, but got {self.low}. Raise it or drop log.")
        if self.integer and not (float(self.low).is_integer() and float(self.high).is_integer()):
            raise ConfigError(f"An integer Interval needs whole ends, but got {self.low} and {self.high}.")

    def contains(self, value: Scalar) -> bool:
        """Return whether `value` is a number in the interval (a whole number if `integer`)."""
        if not _number(value) or (self.integer and not float(value).is_integer()):
            return False
        return self.low <= value <= self.high

    def normal(self, value: Scalar) -> Scalar:
        """Return `value` in the type of this domain: int or float."""
        if not _number(value):
            return value
        return int(value) if self.integer and float(value).is_integer() else float(value)

    def count(self) -> int | None:
        """Return the number of values, or None if the interval is continuous."""
        return int(self.high) - int(self.low) + 1 if self.integer else None

    def points(self) -> tuple[Scalar, ...]:
        """Return every value, or nothing if the interval is continuous."""
        return tuple(range(int(self.low), int(self.high) + 1)) if self.integer else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields as plain values for JSON."""
        return {
            "kind": "interval",
            "low": self.low,
            "high": self.high,
            "log": self.log,
            "integer": self.integer,
            **_conditions(self),
        }


@dataclass(frozen=True)
class Range:
    """The values start, start + step, ... below `stop`, which is exclusive as in Hydra's `range`."""

    start: float
    stop: float
    step: float = 1
    when: tuple[Condition, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        _require_numbers("Range", start=self.start, stop=self.stop, step=self.step)
        if self.step <= 0 or self.stop <= self.start:
            raise ConfigError(f"Range needs step > 0 and stop > start, but got {self.start}, {self.stop}, {self.step}.")

    @property
    def integer(self) -> bool:
        """Whether every value is a whole number."""
        return float(self.start).is_integer() and float(self.step).is_integer()

    def count(self) -> int:
        """Return the number of values, which is at least one."""
        # 1e-9 of a step: range(0, 0.3, 0.1) has three values although the quotient may come out above 3
        return max(1, math.ceil((self.stop - self.start) / self.step - 1e-9))

    def points(self) -> tuple[Scalar, ...]:
        """Return every value. Floats are rounded to 12 significant digits, so that 0.1 + 2 * 0.1 is 0.3."""
        return tuple(self.normal(self.start + i * self.step) for i in range(self.count()))

    def contains(self, value: Scalar) -> bool:
        """Return whether `value` is one of the values, within a billionth of a step."""
        if not _number(value):
            return False
        steps = (value - self.start) / self.step
        return abs(steps - round(steps)) < 1e-9 and 0 <= round(steps) < self.count()

    def normal(self, value: Scalar) -> Scalar:
        """Return `value` in the type of this domain, rounded to 12 significant digits."""
        if not _number(value):
            return value
        return int(value) if self.integer and float(value).is_integer() else float(f"{value:.12g}")

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the fields as plain values for JSON."""
        return {"kind": "range", "start": self.start, "stop": self.stop, "step": self.step, **_conditions(self)}


Domain: TypeAlias = Choice | Interval | Range
Space: TypeAlias = Mapping[str, Domain]


def _key(value: Scalar) -> tuple[bool, Scalar]:
    return isinstance(value, bool), value  # True and 1 get different keys, 1 and 1.0 the same


def space_dict(space: Space) -> dict[str, Any]:
    """Return the space as plain values for JSON."""
    return {key: domain.to_dict() for key, domain in space.items()}


def space_digest(space: Space) -> str:
    """Return the digest of the space; two digests are equal exactly if domains and conditions are."""
    return record.digest(space_dict(space))


def parents_first(space: Space) -> tuple[str, ...]:
    """Return the keys in the order of the space, but each key after those that it depends on.

    Raises ConfigError for a condition on a key that is not in the space, and for keys that depend on each other.
    """
    order: dict[str, None] = {}
    for key in space:
        _place(space, key, order, ())
    return tuple(order)


def _place(space: Space, key: str, order: dict[str, None], below: tuple[str, ...]) -> None:
    if key in below:
        circle = " -> ".join([*below[below.index(key) :], key])
        raise ConfigError(f"Keys depend on each other in one direction, but got {circle}. Drop one condition.")
    if key in order:
        return
    for condition in space[key].when:
        if condition.key not in space:
            raise ConfigError(f"{key} depends on a key of the space, but got {condition.key}. Search that one, too.")
        _place(space, condition.key, order, (*below, key))
    order[key] = None


def applies(space: Space, key: str, params: Values, absent: Container[str] = ()) -> bool:
    """Return whether `params` meets the conditions of `key`.

    A condition on a key without a value counts as met, unless that key is in `absent`.
    """
    return not any(
        c.key in absent or (c.key in params and not c.allowed.contains(params[c.key])) for c in space[key].when
    )


def applicable(space: Space, params: Values) -> dict[str, Scalar]:
    """Return `params` without the keys whose conditions the point does not meet."""
    absent: set[str] = set()
    conditional = any(domain.when for domain in space.values())
    for key in parents_first(space) if conditional else ():
        if not applies(space, key, params, absent):
            absent.add(key)
    return {key: value for key, value in params.items() if key not in absent}


def point_key(params: Values, space: Space | None = None) -> str:
    """Return the canonical text of one point. Equal points have equal texts, if `normal` gave 1 and 1.0 one type.

    With `space`, keys whose conditions are not met are left out first. The points of a study lack them already.
    """
    return record.to_json(applicable(space, params) if space else dict(params))


def all_points(space: Space, limit: int) -> Iterator[dict[str, Scalar]] | None:
    """Return every point of the space, or None if there are more than `limit` or the space is continuous."""
    counts = [domain.count() for domain in space.values()]
    if any(count is None or count > limit for count in counts):
        return None
    found = list(itertools.islice(_points(space, parents_first(space), {}), limit + 1))
    return iter(found) if len(found) <= limit else None


def _points(space: Space, keys: Sequence[str], begun: dict[str, Scalar]) -> Iterator[dict[str, Scalar]]:
    """Yield the points that extend `begun` by values of `keys`, which are in the order of `parents_first`."""
    if not keys:
        yield {key: begun[key] for key in space if key in begun}
        return
    key, rest = keys[0], keys[1:]
    missing = {k for k in space if k not in begun}
    if not applies(space, key, begun, missing):
        yield from _points(space, rest, begun)
        return
    for value in space[key].points():
        yield from _points(space, rest, {**begun, key: value})
