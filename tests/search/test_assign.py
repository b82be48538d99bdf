"""The solver against every mix: additive and shared costs, limits, and the test problems of the benchmark."""

from __future__ import annotations

import itertools
import math
import random
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qflow.search.assign import Limit, Operator, Problem
from qflow.search.cost_terms import CostTerms, cost_terms
from qflow.search.objective import CONSTRAINT
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign

DATA = Path(__file__).parents[2] / "benchmarks" / "data"
COUNT = 9


def mixes(count):
    return ["".join(letters) for letters in itertools.product("86", repeat=count)]


def chain(seed, count=COUNT, cast=0.5):
    """Operators in a chain whose neighbours share readers: a cast where they differ, and one free at the end."""
    rng = random.Random(seed)
    ms = [rng.uniform(0.0, 1.0) for _ in range(count)]

    def price(mix):
        casts = sum(a != b for a, b in zip(mix, mix[1:], strict=False))
        return sum(m for m, letter in zip(ms, mix, strict=True) if letter == "6") + cast * casts

    operators = tuple(Operator(str(i), rng.random(), 0.0, i) for i in range(count))
    return Problem(operators, cost_terms(price, "6" * count, [(i, i + 1) for i in range(count - 1)]), count)


@pytest.mark.parametrize("cast", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(10))
def test_cheapest_and_most_accurate_are_the_optima_of_all_mixes(seed, cast):
    problem, rng = chain(seed, cast=cast), random.Random(seed)
    every = mixes(COUNT)
    budget = problem.budget(rng.random())
    found = problem.cheapest(budget)
    assert problem.error(found) <= budget * (1 + 1e-6)
    optimum = min(problem.price(mix) for mix in every if problem.error(mix) <= budget)
    assert problem.price(found) == pytest.approx(optimum, rel=1e-3)
    most = rng.uniform(0, problem.price(problem.all_int16))
    best = problem.most_accurate(most)
    assert problem.price(best) <= most + 1e-9
    least = min(problem.error(mix) for mix in every if problem.price(mix) <= most)
    assert problem.error(best) == pytest.approx(least, rel=1e-3)


def test_cost_terms_of_pairs_are_exact_and_of_single_operators_are_not():
    problem = chain(3)
    for mix in mixes(COUNT):
        assert problem.time(mix) == pytest.approx(problem.price(mix))
    alone = cost_terms(problem.price, "6" * COUNT, [])
    assert max(abs(alone(mix) - problem.price(mix)) for mix in mixes(COUNT)) > 1.0


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 6))
def test_on_the_test_problems_both_answers_are_within_2_percent_of_all_4096_mixes(number):
    kept = np.load(DATA / f"front-{number}.npz")
    every = mixes(12)
    ms = dict(zip(every, kept["ms"].astype(float).tolist(), strict=True))
    operators = tuple(Operator(str(i), s, s / 256, i) for i, s in enumerate(kept["scores"][0].astype(float).tolist()))
    problem = Problem(operators, cost_terms(ms.__getitem__, "6" * 12, itertools.combinations(range(12), 2)), 12)
    errors, times = np.array([problem.error(m) for m in every]), np.array([ms[m] for m in every])
    for k in range(1, 20):
        budget = problem.budget(k / 20)
        cheapest = problem.cheapest(budget)
        assert problem.error(cheapest) <= budget * (1 + 1e-6)
        assert ms[cheapest] <= 1.02 * times[errors <= budget].min()
        most = times.min() + k / 20 * (times.max() - times.min())
        accurate = problem.most_accurate(most - ms[problem.all_int8])
        assert ms[accurate] <= most + 1e-9
        assert problem.error(accurate) <= 1.02 * errors[times <= most + 1e-9].min()


def test_a_larger_error_budget_is_never_dearer():
    problem = chain(5, count=16)
    prices = [problem.price(problem.cheapest(problem.budget(k / 40))) for k in range(41)]
    assert all(later <= earlier * (1 + 1e-3) for earlier, later in itertools.pairwise(prices))


@pytest.mark.parametrize("seed", range(6))
def test_every_answer_keeps_every_limit(seed):
    problem = chain(seed)
    wide = Limit(cost_terms(lambda mix: mix.count("6") / COUNT, problem.all_int16, []), 0.5)
    spill = Limit(
        cost_terms(lambda mix: float(mix.count("6") ** 2), problem.all_int16, []), 20.0
    )  # no sum over operators
    slow = Limit(problem.time, 0.6 * problem.price(problem.all_int16))
    bounded = problem.bounded(wide, spill, slow)
    answers = [bounded.most_accurate(), *(bounded.cheapest(problem.budget(k / 10)) for k in range(11))]
    assert all(map(bounded.within, answers))
    within = [mix for mix in mixes(COUNT) if bounded.within(mix)]
    least = min(map(problem.error, within))
    assert problem.error(bounded.most_accurate()) <= least + 0.25 * (problem.error(problem.all_int8) - least)


def test_where_no_mix_keeps_the_limits_nothing_is_promoted():
    problem = chain(1)
    assert problem.bounded(Limit(problem.time, -1.0)).most_accurate() == problem.all_int8


def test_letters_of_operators_that_are_not_free_stay_int8():
    operators = (Operator("a", 1.0, 0.0, 1), Operator("b", 1.0, 0.0, 3))
    problem = Problem(operators, cost_terms(lambda mix: float(mix.count("6")), "8686", []), 5)
    assert problem.all_int16 == "86868"[:3] + "68" == problem.most_accurate()
    assert problem.cheapest(1.0) in ("86888", "88868")


def test_an_error_that_is_no_number_counts_as_the_largest():
    operators = (Operator("a", 0.1, 0.0, 0), Operator("b", math.nan, math.nan, 1), Operator("c", 2.0, 0.0, 2))
    problem = Problem(operators, cost_terms(lambda mix: float(mix.count("6")), "666", []), 3)
    assert problem.error("888") == pytest.approx(4.1)
    assert problem.cheapest(0.1) == "866"
    infinite = replace(problem, operators=(replace(operators[0], int8_error=math.inf), *operators[1:]))
    assert infinite.cheapest(0.0) == "666"


def test_no_operator_is_a_problem_too():
    problem = Problem((), CostTerms(lambda mix: 1.0, 1.0, {}), 0)
    assert problem.cheapest(0.0) == problem.most_accurate() == problem.most_accurate(0.0) == ""


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_assign_measures_only_mixes_within_the_limits(share):
    problem = chain(2)
    low, high = problem.price(problem.all_int8), problem.price(problem.all_int16)
    bounded = problem.bounded(Limit(problem.time, low + share * (high - low)))
    asked = []

    def measure(point, label=""):
        if len(asked) == 20:
            raise BudgetSpent("search.n_trials")
        mix = point[ASSIGNMENT]
        asked.append(mix)
        drop = problem.error(mix) / problem.error(problem.all_int8)
        metrics = {"accuracy/drop": drop, "cost/latency_ms": problem.price(mix)}
        return FinishedTrial(0, "", point, label, Outcome((drop,), {CONSTRAINT: drop - 0.1}, {}, metrics), 0.0)

    with suppress(BudgetSpent):
        assign(measure, {}, bounded, max_drop=0.1, int8_drop=1.0, int16_drop=0.0)
    assert asked[0] == bounded.most_accurate()
    assert 10 < len(asked) == len(set(asked))
    assert all(map(bounded.within, asked))
