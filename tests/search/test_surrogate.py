"""What measured drops teach of the others, the front, and which mix comes next."""

import itertools
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.search.assign import Operator, Problem
from qflow.search.cost_terms import cost_terms
from qflow.search.next_mix import Front, NextMix
from qflow.search.strategies import BudgetSpent
from qflow.search.surrogate import Measurement, Surrogate, expected_fall, hypervolume

COUNT = 7
MIXES = ["".join(letters) for letters in itertools.product("86", repeat=COUNT)]


def problem_of(errors, pairs=()):
    operators = tuple(Operator(str(i), error, 0.0, i) for i, error in enumerate(errors))
    return Problem(operators, cost_terms(lambda mix: 1.0 + 0.1 * mix.count("6"), "6" * COUNT, []), COUNT,
                   pairs=dict(pairs))  # fmt: skip


def test_a_measured_drop_is_known_and_an_unmeasured_one_is_not():
    problem = problem_of(range(1, COUNT + 1))
    measured = [Measurement("6" * COUNT, 0.0), Measurement("8" * COUNT, 0.4), Measurement("8866888", 0.1)]
    means, deviations = Surrogate(problem, measured, 0.0, 0.4).expected([*(m.mix for m in measured), "8666888"])
    assert means[:3] == pytest.approx([0.0, 0.4, 0.1], abs=0.003)
    assert max(deviations[:3]) < 0.001 < 0.01 < deviations[3]


def test_without_measurements_the_drop_is_in_proportion_to_the_predicted_error():
    problem = problem_of(range(1, COUNT + 1))
    means, _ = Surrogate(problem, [], 0.1, 0.5).expected(MIXES)
    assert means == pytest.approx([0.1 + 0.4 * problem.error(mix) / problem.error("8" * COUNT) for mix in MIXES])


def test_a_drop_under_other_settings_teaches_less():
    problem = problem_of([1.0] * COUNT)
    mix, worse = "6688888", 0.5
    near, far = (
        Surrogate(problem, [Measurement(mix, worse, around)], 0.0, 0.5).expected([mix], "mse")
        for around in ("mse", "kl")
    )
    plain = Surrogate(problem, [], 0.0, 0.5).expected([mix])[0]
    assert plain[0] < far[0][0] < near[0][0] == pytest.approx(worse, abs=0.001)
    assert near[1][0] < far[1][0]


def test_two_operators_that_lose_more_together_are_found_and_the_program_counts_them():
    truth = problem_of([0.1] * COUNT, {(2, 5): 0.5})
    rng = random.Random(0)
    measured = [Measurement(mix, truth.error(mix)) for mix in rng.sample(MIXES, 40)]
    corrected = Surrogate(problem_of([0.1] * COUNT), measured, 0.0, truth.error("8" * COUNT)).corrected()
    assert max(corrected.pairs, key=lambda pair: corrected.pairs[pair]) == (2, 5)
    wrong = problem_of([0.1] * COUNT)
    off = [np.abs([p.error(mix) - truth.error(mix) for mix in MIXES]).mean() for p in (corrected, wrong)]
    assert off[0] < 0.1 * off[1]


@pytest.mark.parametrize("seed", range(6))
def test_the_program_with_pairs_finds_the_optimum_of_all_mixes(seed):
    rng = random.Random(seed)
    pairs = {(0, 3): rng.random(), (1, 2): -0.3 * rng.random(), (3, 6): rng.random()}
    problem = problem_of([rng.random() for _ in range(COUNT)], pairs)
    budget = problem.budget(rng.random())
    found = problem.cheapest(budget)
    assert problem.error(found) <= budget * (1 + 1e-6)
    assert problem.price(found) == min(problem.price(mix) for mix in MIXES if problem.error(mix) <= budget)
    assert problem.error(problem.finest) == pytest.approx(min(map(problem.error, MIXES)))


POINTS = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8)


@settings(deadline=None)
@given(POINTS, st.floats(0, 1), st.floats(0, 1))
def test_a_certain_drop_adds_the_hypervolume_between_the_fronts(points, drop, time):
    worst = (1.0, 1.0)
    gain = Front(points, worst).gains(np.array([drop]), np.array([1e-9]), np.array([time]))[0]
    assert gain == pytest.approx(hypervolume([*points, (drop, time)], worst) - hypervolume(points, worst), abs=1e-6)


@settings(deadline=None)
@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0.01, 1))
def test_an_expected_fall_is_the_mean_of_the_falls(level, mean, deviation):
    draws = mean + deviation * np.random.default_rng(0).standard_normal(20_000)
    found = expected_fall(level, np.array([mean]), np.array([deviation]))[0]
    assert found == pytest.approx(np.maximum(level - draws, 0.0).mean(), abs=0.03 * deviation)


def test_no_mix_is_chosen_twice_and_none_that_cannot_save_time():
    problem = problem_of([1.0] * COUNT)
    measured = [Measurement("6" * COUNT, 0.0), Measurement("8" * COUNT, 0.0)]
    chooser = NextMix(problem, 0.01, 0.0, 0.4)
    assert chooser.choose(measured, {m.mix for m in measured}, front=False) is None  # all int8 meets the goal
    measured[1] = Measurement("8" * COUNT, 0.4)
    first = chooser.choose(measured, {m.mix for m in measured}, front=False)
    assert first is not None
    assert chooser.choose(measured, {first, *(m.mix for m in measured)}, front=False) != first


@pytest.mark.slow
def test_ten_evaluations_cover_the_front_of_a_network():
    """All 4096 mixes of it were evaluated, so the exhaustive front is known."""
    from benchmarks.front_problem import EnumeratedProblem
    from benchmarks.search_front import Measured, by_assign

    problem = EnumeratedProblem.read(Path(__file__).parents[2] / "benchmarks" / "data" / "front-3.npz")
    measure = Measured(problem, 0, most=10)
    with suppress(BudgetSpent):
        by_assign(measure)
    assert problem.volume(measure.mixes) > 0.98 * problem.volume(problem.drops)
