"""Studies whose keys depend on each other: every sampler asks for a key exactly where it applies."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.spaces import spaces

from qflow.search.domain import Choice, Condition, Interval, Range, applicable, applies, point_key
from qflow.search.proposal import SAMPLERS
from qflow.search.sampler import make_sampler
from qflow.search.study import Study
from qflow.search.terms import Terms

pytestmark = pytest.mark.slow  # real stores on disk

SPACE = {
    "percentile": Interval(90, 100, when=(Condition("method", Choice(("percentile",))),)),
    "ratio": Interval(0, 1),
    "ranking": Choice(("score", "score_per_ms"), when=(Condition("ratio", Interval(0.1, 0.9)),)),
    "method": Choice(("mse", "kl", "percentile")),
    "steps": Range(0, 300, 100),
    "rate": Interval(1e-6, 1e-3, log=True, when=(Condition("steps", Interval(1, 1000)),)),
    "moving": Choice((True, False), when=(Condition("rate", Interval(1e-5, 1e-3)),)),
}


def in_memory(space, sampler, seed=0, directions=("maximize", "minimize")) -> Study:
    study = optuna.create_study(directions=directions, storage=optuna.storages.InMemoryStorage())
    seeded = lambda asked: make_sampler(sampler, 100 * seed + asked, n_trials=8)  # noqa: E731
    return Study(study, Terms(study, space, directions), Path("unused"), seeded, shared=False)


def finish(study, proposal):
    """Values from the point alone, as an evaluation would."""
    value = float(sum(map(ord, point_key(proposal.params))) % 97)
    study.set_result(proposal.number, {"drop": value - 50}, "{}")
    study.complete(proposal.number, (value, -value)[: len(study.directions)])


def check(space, point):
    """Each key is there exactly where it applies, with a value of its domain."""
    assert applicable(space, point) == point
    missing = set(space) - set(point)
    assert {key for key in space if applies(space, key, point, missing)} == set(point)
    assert all(space[key].contains(value) for key, value in point.items())


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "gp"])
@given(space=spaces(), seed=st.integers(0, 9), single=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_key_is_there_exactly_where_it_applies(sampler, space, seed, single):
    study = in_memory(space, sampler, seed, ("maximize",) if single else ("maximize", "minimize"))
    for _ in range(6):
        proposal = study.ask()
        check(space, proposal.params)
        finish(study, proposal)
    for trial in study.trials():
        check(space, trial.params)


@given(space=spaces(), seed=st.integers(0, 9))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_gaussian_process_too(space, seed):
    study = in_memory(space, "gp", seed, ("minimize",))
    for _ in range(4):
        proposal = study.ask()
        check(space, proposal.params)
        finish(study, proposal)


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "gp"])
@given(space=spaces(), data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_enqueued_point_keeps_its_values_and_is_filled_where_keys_apply(sampler, space, data):
    given_values = {}
    for key, domain in space.items():
        values = domain.points() or (domain.low, domain.high)
        if data.draw(st.booleans()):
            given_values[key] = data.draw(st.sampled_from(values))
    study = in_memory(space, sampler)
    study.enqueue({**given_values, "outside": 7}, label="mine")
    proposal = study.ask()
    point = dict(proposal.params)
    assert (proposal.label, point.pop("outside")) == ("mine", 7)
    check(space, point)
    assert {k: point[k] for k in given_values if k in point} == {
        k: space[k].normal(v) for k, v in given_values.items() if k in point
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resumed_study_goes_on_in_the_same_way(store, sampler):
    points = []
    for _ in range(2):
        study = Study.open(
            store, "task/stage", space=SPACE, directions=("maximize", "minimize"), sampler=sampler, n_trials=8
        )
        for _ in range(4):
            proposal = study.ask()
            check(SPACE, proposal.params)
            finish(study, proposal)
            points.append(proposal.params)
    assert [t.params for t in study.trials()] == points
    assert len({point_key(p) for p in points}) > 4


def test_values_outside_the_space_decide_what_applies(store):
    space = {**SPACE, "method": Choice(("mse", "kl"))}
    study = Study.open(store, "task/stage", space=space, directions=("minimize",), sampler="random")
    study.enqueue({"method": "percentile", "steps": 0, "rate": 0.5, "ratio": 2.0}, label="odd")
    odd = study.ask().params
    assert (odd["method"], odd["ratio"]) == ("percentile", 2.0)
    assert "percentile" in odd and not {"rate", "moving", "ranking"} & set(odd)


def test_a_point_that_was_cut_short_keeps_what_it_was_given(store):
    """Killed while it was asked, some keys are known and some are not: what is open stays as it was enqueued."""
    study = Study.open(store, "task/stage", space=SPACE, directions=("minimize",), sampler="random")
    study.enqueue({"percentile": 99.0, "ratio": 0.5}, label="mine")
    assert study.trials()[0].params == {"percentile": 99.0, "ratio": 0.5}


def test_points_that_differ_only_where_a_key_does_not_apply_are_one(store):
    study = Study.open(store, "task/stage", space=SPACE, directions=("minimize",), sampler="random")
    for percentile in (95.0, 99.0):
        study.enqueue({"method": "mse", "percentile": percentile, "ratio": 0.0, "steps": 0})
    assert len({point_key(study.ask().params) for _ in range(2)}) == 1


def test_a_small_space_ends_when_every_point_that_differs_was_tried(store):
    """The loop counts a point once, whatever was said of keys that do not apply to it."""
    from support.harness import Harness, outcome

    margin = Choice((1, 2), when=(Condition("method", Choice(("percentile",))),))
    harness = Harness(store, {"margin": margin, "method": Choice(("mse", "percentile"))})
    fixed = [(f"mse {i}", {"method": "mse", "margin": i}) for i in (1, 2)]
    trials = harness.run(50, evaluate=lambda params, folder: outcome({**params, "int16_ratio": 0.0}), fixed=fixed)
    assert sorted(point_key(t.params) for t in trials) == sorted(
        point_key(p)
        for p in ({"method": "mse"}, {"method": "percentile", "margin": 1}, {"method": "percentile", "margin": 2})
    )
    assert harness.problems() == []
