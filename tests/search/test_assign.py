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


def weighted(seed, count=5, exclude=True):
    """Outputs in a chain, the last ones with a weight each, whose letter excludes that of the operator before."""
    rng = random.Random(seed)
    ms = [rng.uniform(0.1, 1.0) for _ in range(2 * count - 1)]
    pairs = tuple((i, count + i) for i in range(count - 1)) if exclude else ()

    def price(mix):
        assert not any(mix[a] == mix[b] == "6" for a, b in pairs), "the device has no such mix"
        return sum(m for m, letter in zip(ms, mix, strict=True) if letter == "6")

    operators = tuple(Operator(str(i), rng.random(), 0.0, i, weight=i >= count) for i in range(2 * count - 1))
    alone = range(count, 2 * count - 1) if exclude else ()
    highest = "6" * count + ("8" if exclude else "6") * (count - 1)
    return Problem(operators, cost_terms(price, highest, [], alone), 2 * count - 1, exclusions=pairs)


@pytest.mark.parametrize("exclude", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_with_weights_both_answers_are_the_optima_of_all_legal_mixes(seed, exclude):
    problem = weighted(seed, exclude=exclude)
    legal = [mix for mix in mixes(9) if problem.within(mix)]
    assert (len(legal) < 2**9) == exclude
    least = min(map(problem.error, legal))
    assert problem.error(problem.finest) == pytest.approx(least)
    assert problem.budget(0.0) == pytest.approx(least)
    assert problem.all_int16 == "666668888"
    for share in (0.0, 0.1, 0.4, 0.8):
        budget = problem.budget(share)
        found = problem.cheapest(budget)
        assert found in legal and problem.error(found) <= budget * (1 + 1e-6)
        optimum = min(problem.price(mix) for mix in legal if problem.error(mix) <= budget * (1 + 1e-9))
        assert problem.price(found) == pytest.approx(optimum, rel=1e-3)
        accurate = problem.most_accurate(share * problem.price(problem.all_int16))
        within = [m for m in legal if problem.price(m) <= share * problem.price(problem.all_int16) + 1e-9]
        assert accurate in within
        assert problem.error(accurate) == pytest.approx(min(map(problem.error, within)), rel=1e-3)


def test_a_promotion_demotes_what_it_excludes():
    problem = weighted(0)
    assert problem.flipped("666668888", 6) == "686668688"
    assert problem.flipped("686668688", 1) == "666668888"
    assert problem.flipped("666668888", 4) == "666688888"


@pytest.mark.parametrize("seed", range(4))
def test_assign_starts_from_a_mix_with_weights_where_all_int16_misses(seed):
    problem, asked = weighted(seed), []
    hard = max((o for o in problem.operators if o.weight), key=lambda o: o.gain)
    top = problem.flipped(problem.all_int16, hard.place)

    def measure(point, label=""):
        mix = point[ASSIGNMENT]
        assert problem.within(mix)
        asked.append(mix)
        drop = 0.0 if mix[hard.place] == "6" else 0.5
        metrics = {"accuracy/drop": drop, "cost/latency_ms": problem.price(mix)}
        return FinishedTrial(0, "", point, label, Outcome((drop,), {CONSTRAINT: drop - 0.1}, {}, metrics), 0.0)

    assign(measure, {}, problem, max_drop=0.1, int8_drop=0.5, int16_drop=0.0, top=top, explore=False)
    only = problem.flipped(problem.all_int8, hard.place)
    assert min((m for m in asked if m[hard.place] == "6"), key=problem.price) == only


def test_promotions_that_cost_nothing_together_are_demoted_together():
    """Either of the two operators that one operator reads costs a cast at int16 alone, both together cost nothing."""
    price = lambda mix: 0.5 * (mix[0] != mix[1]) + (mix[2] == "6")  # noqa: E731
    operators = (Operator("a", 0.01, 0.0, 0), Operator("b", 0.01, 0.0, 1), Operator("c", 1.0, 0.0, 2))
    problem = Problem(operators, cost_terms(price, "666", [(0, 1)]), 3)
    assert problem._pruned("666", 0.1) == "886"
