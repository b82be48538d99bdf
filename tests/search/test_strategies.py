"""Every strategy under one contract, on a landscape whose culprits and optimum are known."""

from __future__ import annotations

import itertools
import random

import pytest

from qflow.search.assign import Operator, Problem
from qflow.search.objective import CONSTRAINT, best_trial
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign, halving, ladder

N, GOAL = 20, 0.01


class Landscape:
    """Operators with a loss each and a price; drops add up, with a wobble that scores do not know."""

    def __init__(self, seed=0, culprits=3, wobble=0.0):
        rng = random.Random(seed)
        self.loss = [rng.uniform(0, 2e-4) for _ in range(N)]
        self.culprits = sorted(rng.sample(range(N), culprits))
        for i in self.culprits:
            self.loss[i] = rng.uniform(0.05, 0.2)
        self.ms = [rng.uniform(0.01, 0.1) for _ in range(N)]
        self.scores = [loss * rng.uniform(1 - wobble, 1 + wobble) for loss in self.loss]
        self.trials: dict[tuple, FinishedTrial] = {}
        self.asked: list[tuple] = []
        self.budget = 10_000

    def price(self, mix):
        return 1.0 + sum(ms for ms, letter in zip(self.ms, mix, strict=True) if letter == "6")

    def mix(self, point):
        if ASSIGNMENT in point:
            return point[ASSIGNMENT]
        count = round(point["qconfig.int16_ratio"] * N)
        top = sorted(range(N), key=lambda i: -self.scores[i])[:count]
        return "".join("6" if i in top else "8" for i in range(N))

    def drop(self, mix):
        return sum(loss for loss, letter in zip(self.loss, mix, strict=True) if letter == "8")

    def measure(self, point, label=""):
        key = tuple(sorted(point.items()))
        if key not in self.trials:
            if len(self.trials) >= self.budget:
                raise BudgetSpent("search.n_trials")
            mix = self.mix(point)
            drop, ms = self.drop(mix), self.price(mix)
            outcome = Outcome((0.9 - drop, ms), {CONSTRAINT: round(drop - GOAL, 9)}, point,
                              {"accuracy/drop": drop, "cost/latency_ms": ms})  # fmt: skip
            self.trials[key] = FinishedTrial(len(self.trials), "", point, label, outcome, 0.0)
            self.asked.append(key)
        return self.trials[key]

    @property
    def problem(self):
        rows = zip(self.scores, self.ms, strict=True)
        return Problem(tuple(Operator(str(i), s, s / 256, ms) for i, (s, ms) in enumerate(rows)), self.price)

    def best(self):
        return best_trial(list(self.trials.values()))


def run_ladder(land):
    ladder(land.measure, {}, "qconfig.int16_ratio", [k / N for k in range(N + 1)])


def run_assign(land):
    floor, ceiling = land.drop("8" * N), land.drop("6" * N)
    assign(land.measure, {}, land.problem, max_drop=GOAL, int8_drop=floor, int16_drop=ceiling, explore=False)


CONTRACT = {"ratio": run_ladder, "assign": run_assign}


@pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
@pytest.mark.parametrize("seed", range(8))
def test_the_culprits_are_promoted_and_nothing_else(run, seed):
    land = Landscape(seed)
    run(land)
    assert [i for i, letter in enumerate(land.mix(land.best().params)) if letter == "6"] == land.culprits
    assert len(land.trials) <= 8


@pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
@pytest.mark.parametrize("seed", range(8))
def test_scores_that_are_wrong_by_half_still_lead_to_the_goal(run, seed):
    land = Landscape(seed, culprits=6, wobble=0.5)
    run(land)
    assert land.best() is not None
    assert set(land.culprits) <= {i for i, x in enumerate(land.mix(land.best().params)) if x == "6"}


@pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_search_that_is_cut_goes_on_as_if_it_had_not_been(run, cut):
    whole, land = Landscape(3, culprits=5), Landscape(3, culprits=5)
    run(whole)
    land.budget = cut
    with pytest.raises(BudgetSpent):
        run(land)
    land.budget = 10_000
    run(land)
    assert land.asked == whole.asked


@pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
def test_where_nothing_meets_the_goal_it_ends(run):
    land = Landscape(1)
    land.drop = lambda mix: 0.5
    run(land)
    assert land.best() is None
    assert len(land.trials) <= 12


@pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
def test_a_trial_that_fails_is_a_miss(run):
    land = Landscape(2)
    measure, failed = land.measure, []

    def fails_once(point, label=""):
        if not failed:
            failed.append(point)
        return None if point == failed[0] else measure(point, label)

    land.measure = fails_once
    run(land)
    assert land.best() is not None


def explored(land, budget):
    """Mixes of a search that goes on to the front until its trials are spent."""
    land.budget = budget
    floor, ceiling = land.drop("8" * N), land.drop("6" * N)
    with pytest.raises(BudgetSpent):
        assign(land.measure, {}, land.problem, max_drop=GOAL, int8_drop=floor, int16_drop=ceiling)
    return [land.mix(dict(point)) for point in land.asked]


@pytest.mark.parametrize("seed", range(4))
def test_exploring_leaves_no_mix_of_the_solver_better_than_the_front(seed):
    land = Landscape(seed, culprits=6)
    mixes = explored(land, 40)
    assert len(set(mixes)) == 40
    ends = {"8" * N, "6" * N}
    assert not ends & set(mixes)
    problem = land.problem
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        wanted = problem.cheapest(problem.budget(share))
        at_most = [m for m in {*mixes, *ends} if land.drop(m) <= land.drop(wanted) + 0.01]
        assert min(map(land.price, at_most)) <= land.price(wanted) + 0.1


def test_exploring_does_not_pay_more_than_all_int16():
    land = Landscape(0, culprits=6)
    price, casts = land.price, lambda mix: 0.3 * sum(a != b for a, b in zip(mix, mix[1:], strict=False))
    land.price = lambda mix: price(mix) + casts(mix)  # neighbours that differ cost a cast: most mixes do not pay
    goal = len(explored(land, 12))
    mixes = explored(land, 40)
    dear = [m for m in mixes[goal:] if land.price(m) > land.price("6" * N)]
    assert len(dear) <= 2


def test_a_search_that_explores_goes_on_where_it_was_cut():
    whole, land = Landscape(3, culprits=5), Landscape(3, culprits=5)
    mixes = explored(whole, 30)
    explored(land, 17)
    assert explored(land, 30) == mixes


def test_accuracy_that_is_not_monotone_does_not_hide_a_lower_rung():
    land = Landscape(0)
    meeting = {2, 5, 6, 7, 8, 16, 20}
    land.drop = lambda mix: 0.0 if mix.count("6") in meeting else 0.1
    run_ladder(land)
    assert land.mix(land.best().params).count("6") == 2


@pytest.mark.parametrize("seed", range(20))
def test_cheapest_is_the_optimum_of_all_mixes(seed):
    rng = random.Random(seed)
    ms = [rng.uniform(0.0, 1.0) for _ in range(9)]
    price = lambda mix: sum(m for m, letter in zip(ms, mix, strict=True) if letter == "6")  # noqa: E731
    problem = Problem(tuple(Operator(str(i), rng.random(), 0.0, ms[i]) for i in range(9)), price)
    budget = problem.budget(rng.random())
    mixes = ["".join(letters) for letters in itertools.product("86", repeat=9)]
    optimum = min(price(mix) for mix in mixes if problem.error(mix) <= budget)
    found = problem.cheapest(budget)
    assert problem.error(found) <= budget * (1 + 1e-6)
    assert price(found) == pytest.approx(optimum, abs=1e-5)
    limit = rng.uniform(0, sum(ms))
    least = min(problem.error(mix) for mix in mixes if price(mix) <= limit)
    best = problem.most_accurate(limit)
    assert price(best) <= limit + 1e-6
    assert problem.error(best) == pytest.approx(least, abs=1e-5)


def test_a_larger_error_budget_is_never_dearer():
    problem = Landscape(5, culprits=8, wobble=0.4).problem
    prices = [problem.price(problem.cheapest(problem.budget(k / 40))) for k in range(41)]
    assert prices == sorted(prices, reverse=True)


def test_halving_trains_the_better_half_further():
    asked = []

    def measure(point, label=""):
        asked.append((point["qat.learning_rate"], point["qat.steps"]))
        if point["qat.learning_rate"] == 1.0:
            return None  # diverged
        score = point["qat.learning_rate"] * point["qat.steps"]
        return FinishedTrial(0, "", point, label, Outcome((score,), {}, {}, {"accuracy/drop": -score}), 0.0)

    halving(measure, [{"qat.learning_rate": r} for r in (1.0, 0.1, 0.2, 0.3)], [10, 20, 40])
    assert asked == [(1.0, 10), (0.1, 10), (0.2, 10), (0.3, 10), (0.3, 20), (0.3, 40)]
