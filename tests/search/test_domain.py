"""Spaces: what they contain, refuse and hash to."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.spaces import FINITE, spaces

from qflow.core.errors import ConfigError
from qflow.search.domain import (
    Choice,
    Condition,
    Interval,
    Range,
    all_points,
    applicable,
    applies,
    parents_first,
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


METHOD = Choice(("mse", "percentile"))
CONDITIONAL = {
    "percentile": Range(90, 100, 5, when=(Condition("method", Choice(("percentile",))),)),
    "method": METHOD,
}


def test_a_key_that_does_not_apply_is_absent_and_makes_no_difference():
    assert parents_first(CONDITIONAL) == ("method", "percentile")
    points = [{"method": "mse", "percentile": p} for p in (90, 95)]
    assert [applicable(CONDITIONAL, point) for point in points] == [{"method": "mse"}] * 2
    assert len({point_key(point, CONDITIONAL) for point in points}) == 1
    assert len({point_key({**p, "method": "percentile"}, CONDITIONAL) for p in points}) == 2
    assert applicable(CONDITIONAL, {"percentile": 90, "other": 1}) == {"percentile": 90, "other": 1}  # still open
    assert list(all_points(CONDITIONAL, 3) or ()) == [
        {"method": "mse"}, {"percentile": 90, "method": "percentile"}, {"percentile": 95, "method": "percentile"},
    ]  # fmt: skip
    assert all_points(CONDITIONAL, 2) is None


def test_what_depends_on_an_absent_key_is_absent():
    space = {**CONDITIONAL, "margin": Range(0, 2, when=(Condition("percentile", Choice((90, 95))),))}
    assert applicable(space, {"method": "mse", "percentile": 90, "margin": 1}) == {"method": "mse"}
    assert len(list(all_points(space, 100) or ())) == 5


def test_a_condition_is_part_of_the_digest_and_none_is_not():
    assert METHOD.to_dict() == {"kind": "choice", "values": ["mse", "percentile"]}
    assert space_digest({"method": METHOD}) == "440ad59db92a8da6"  # as before there were conditions
    plain = {**CONDITIONAL, "percentile": Range(90, 100, 5)}
    assert space_digest(CONDITIONAL) != space_digest(plain)
    assert json.loads(json.dumps(space_dict(CONDITIONAL))) == space_dict(CONDITIONAL)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"a": "a"}, "got a -> a"),
        ({"a": "b", "b": "c", "c": "a"}, "got a -> b -> c -> a"),
        ({"a": "nowhere"}, "a depends on a key of the space, but got nowhere"),
    ],
)
def test_conditions_that_lead_nowhere_are_refused(conditions, message):
    space = {
        key: Choice((1, 2), when=(Condition(conditions[key], Choice((1,))),) if key in conditions else ())
        for key in "abc"
    }
    with pytest.raises(ConfigError, match=message):
        parents_first(space)


@given(spaces(FINITE))
def test_all_points_are_the_product_with_what_does_not_apply_left_out(space):
    axes = [domain.points() for domain in space.values()]
    product = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    listed = [point_key(point) for point in all_points(space, len(product)) or ()]
    assert len(listed) == len(set(listed))
    assert set(listed) == {point_key(point, space) for point in product}
    for point in product:
        left = applicable(space, point)
        assert applicable(space, left) == left
        missing = set(space) - set(left)
        assert {key for key in space if applies(space, key, left, missing)} == set(left)
