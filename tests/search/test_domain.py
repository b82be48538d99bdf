"""Spaces: what they contain, refuse and hash to."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.errors import ConfigError
from qflow.search.domain import (
    Choice,
    Interval,
    Range,
    all_points,
    point_key,
    space_dict,
    space_digest,
)


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Choice(("kl", "mse", None)), ["kl", None], ["min", 0, False]),
        (Choice((1, True)), [1, True, 1.0], [False, 2]),
        (Interval(0.0, 1.0), [0, 0.5, 1.0], [-0.1, 1.1, "0.5", True, math.nan]),
        (Interval(1, 8, integer=True), [1, 8, 3.0], [0, 9, 2.5, None]),
        (Range(0, 10, 5), [0, 5, 5.0], [10, 4, "5"]),
        (Range(0.1, 0.4, 0.1), [0.1, 0.2, 0.3, 0.1 + 0.2], [0.4, 0.15, 0.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_contains(domain, inside, outside):
    assert [value for value in inside if not domain.contains(value)] == []
    assert [value for value in outside if domain.contains(value)] == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(()), "at least one value"),
        (lambda: Choice(("a", "a")), "each value once"),
        (lambda: Choice(([1],)), "text, numbers"),
        (lambda: Choice((math.nan,)), "text, numbers"),
        (lambda: Interval(1, 0), "low <= high"),
        (lambda: Interval(0, 1, log=True), "low > 0"),
        (lambda: Interval(0.5, 2, integer=True), "whole ends"),
        (lambda: Interval("0", 1), "finite numbers"),
        (lambda: Interval(0, math.inf), "finite numbers"),
        (lambda: Range(0, 0, 1), "stop > start"),
        (lambda: Range(0, 1, -1), "step > 0"),
    ],
)
def test_refuses_in_one_line(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_range_stops_before_its_end_and_carries_no_float_dust():
    assert Range(0.1, 0.4, 0.1).points() == (0.1, 0.2, 0.3)
    assert Range(0, 0.3, 0.1).points() == (0.0, 0.1, 0.2)
    assert Range(1, 8, 3).points() == (1, 4, 7)
    assert all(isinstance(value, int) for value in Range(1.0, 8.0, 3.0).points())


@given(st.integers(-50, 50), st.integers(1, 40), st.integers(1, 7))
def test_a_whole_range_is_the_range_of_python(start, length, step):
    domain = Range(start, start + length, step)
    assert domain.points() == tuple(range(start, start + length, step))
    assert all(domain.contains(value) for value in domain.points())


def test_digest_tells_spaces_apart_and_survives_json():
    space = {"a": Choice(("x", "y")), "b": Interval(0, 1, log=False)}
    assert space_digest(space) == space_digest(dict(reversed(space.items())))
    assert space_digest(space) != space_digest({**space, "b": Interval(0, 2)})
    assert json.loads(json.dumps(space_dict(space))) == space_dict(space)


def test_all_points_of_a_finite_space_only():
    space = {"a": Choice(("x", "y")), "b": Range(0, 3), "c": Interval(1, 2, integer=True)}
    points = list(all_points(space, limit=12) or ())
    assert len({point_key(point) for point in points}) == 12
    assert all_points(space, limit=11) is None
    assert all_points({"a": Interval(0, 1)}, limit=100) is None
    assert all_points({"a": Range(0, 10**9)}, limit=100) is None
