"""Every strategy under one contract, on a synthetic problem whose bad operators and optimum are known."""
# Long: all strategies run through one contract on the same synthetic problem.

from __future__ import annotations

import math
import random
import tempfile
import threading
from contextlib import nullcontext
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.errors import TrialError
from qflow.search.assign import Operator, Problem
from qflow.search.attempt import Serial
from qflow.search.cost_terms import cost_terms
from qflow.search.domain import Choice
from qflow.search.driver import Driver
from qflow.search.objective import CONSTRAINT, best_trial, meets
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.sampler import make_sampler
from qflow.search.spool import Spool
from qflow.search.strategies import (
    ALONE,
    ASSIGNMENT,
    AtOnce,
    BudgetSpent,
    assign,
    demote,
    halving,
    leave_out,
    raise_until_met,
)
from qflow.search.study import Study
from qflow.search.terms import Terms

RATIO = "qconfig.int16_ratio"
N, GOAL = 20, 0.01


class SyntheticProblem:
    """Operators with a loss and a latency each; losses add up, and the scores differ from them by a random factor."""

    def __init__(self, seed=0, bad=3, wobble=0.0, count=N, cast=0.0):
        rng = random.Random(seed)
        self.count, self.cast = count, cast
        self.loss = [rng.uniform(0, 2e-4) for _ in range(count)]
        self.bad = sorted(rng.sample(range(count), min(bad, count)))
        for i in self.bad:
            self.loss[i] = rng.uniform(0.05, 0.2)
        self.ms = [rng.uniform(0.01, 0.1) for _ in range(count)]
        self.scores = [loss * rng.uniform(1 - wobble, 1 + wobble) for loss in self.loss]
        self.trials: dict[tuple, FinishedTrial] = {}
        self.asked: list[tuple] = []
        self.budget = 10_000
        self.driver = None  # of the sampler: a study outlives the process

    @property
    def all_int8(self):
        return "8" * self.count

    @property
    def all_int16(self):
        return "6" * self.count

    def price(self, mix):
        """What each int16 operator takes, and `cast` for each pair of neighbours that differ."""
        casts = sum(a != b for a, b in zip(mix, mix[1:], strict=False))
        return 1.0 + sum(ms for ms, letter in zip(self.ms, mix, strict=True) if letter == "6") + self.cast * casts

    def mix(self, point):
        if ASSIGNMENT in point:
            return point[ASSIGNMENT]
        count = round(point[RATIO] * self.count)
        top = sorted(range(self.count), key=lambda i: -math.inf if math.isnan(self.scores[i]) else -self.scores[i])[
            :count
        ]
        return "".join("6" if i in top else "8" for i in range(self.count))

    def drop(self, mix):
        return sum(loss for loss, letter in zip(self.loss, mix, strict=True) if letter == "8")

    def outcome(self, point):
        mix = self.mix(point)
        drop, ms = self.drop(mix), self.price(mix)
        return Outcome((0.9 - drop, ms), {CONSTRAINT: round(drop - GOAL, 9)}, dict(point),
                       {"accuracy/drop": drop, "cost/latency_ms": ms})  # fmt: skip

    def measure(self, point, label=""):
        key = tuple(sorted(point.items()))
        if key not in self.trials:
            if len(self.trials) >= self.budget:
                raise BudgetSpent("search.n_trials")
            self.trials[key] = FinishedTrial(len(self.trials), "", point, label, self.outcome(point), 0.0)
            self.asked.append(key)
        return self.trials[key]

    @property
    def assignment(self):
        operators = tuple(Operator(str(i), score, score / 256, i) for i, score in enumerate(self.scores))
        neighbours = [(i, i + 1) for i in range(self.count - 1)]
        return Problem(operators, cost_terms(lambda mix: self.price(mix), self.all_int16, neighbours), self.count)

    def best(self):
        return best_trial(list(self.trials.values()))

    def promoted(self):
        return [i for i, letter in enumerate(self.mix(self.best().params)) if letter == "6"]


def run_ratio(problem, at_once=ALONE):
    ratios = [k / (problem.count or 1) for k in range(problem.count + 1)]
    raise_until_met(problem.measure, {}, RATIO, ratios, at_once=at_once)


def run_assign(problem, at_once=ALONE):
    drops = {"int8_drop": problem.drop(problem.all_int8), "int16_drop": problem.drop(problem.all_int16)}
    assign(problem.measure, {}, problem.assignment, max_drop=GOAL, **drops, explore=False, at_once=at_once)


class NoTracker:
    """A tracker that keeps nothing."""

    def start_trial(self, study_run_id, study, number, label):
        return str(number)

    def upload(self, run_id, folder):
        return []

    def commit(self, *_):
        pass

    end = commit

    def keeping(self, place):
        return nullcontext()


def run_optuna(problem):
    """The sampler over the ratio, as the session drives it: until the space or the budget is used up."""
    if problem.driver is None:
        shares = tuple(dict.fromkeys(k / (problem.count or 1) for k in range(problem.count + 1)))
        sampler = make_sampler("tpe", 0, len(shares))
        inner = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        terms = Terms(inner, {RATIO: Choice(shares)}, ("maximize", "minimize"))
        study = Study(inner, terms, Path(), lambda _: sampler, shared=False)

        def evaluate(params, folder):
            trial = problem.measure(params)
            if trial is None:
                raise TrialError("it fails")
            return trial.outcome

        nothing = lambda _: None  # noqa: E731
        scratch = Path(tempfile.mkdtemp())
        spool = Spool(scratch / "spool", "planted", NoTracker(), True, lambda: None)
        runs = Serial(evaluate, len(study.directions))
        problem.driver = Driver(study, spool, runs, scratch, nothing, nothing, threading.Event())
    while True:
        if len(problem.driver.finished) >= problem.budget:
            raise BudgetSpent("search.n_trials")
        if problem.driver.sample() is None:
            return


DIRECTED = {"ratio": run_ratio, "assign": run_assign}
CONTRACT = {**DIRECTED, "optuna": run_optuna}
contract = pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
directed = pytest.mark.parametrize("run", DIRECTED.values(), ids=DIRECTED)


@contract
@pytest.mark.parametrize("cast", [0.0, 0.03], ids=["additive", "casts"])
@pytest.mark.parametrize("seed", range(4))
def test_the_planted_operators_are_promoted(run, seed, cast):
    problem = SyntheticProblem(seed, cast=cast)
    run(problem)
    assert set(problem.bad) <= set(problem.promoted())
    assert len(problem.trials) <= N + 1


@directed
@pytest.mark.parametrize("seed", range(8))
def test_nothing_but_the_bad_operators_is_promoted_in_few_trials(run, seed):
    problem = SyntheticProblem(seed)
    run(problem)
    assert problem.promoted() == problem.bad
    assert len(problem.trials) <= 8


@pytest.mark.slow
@contract
@pytest.mark.parametrize("seed", range(8))
def test_scores_that_are_wrong_by_half_still_lead_to_the_goal(run, seed):
    problem = SyntheticProblem(seed, bad=6, wobble=0.5)
    run(problem)
    assert set(problem.bad) <= set(problem.promoted())


@contract
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_search_that_is_cut_goes_on_as_if_it_had_not_been(run, cut):
    whole, problem = SyntheticProblem(3, bad=5), SyntheticProblem(3, bad=5)
    run(whole)
    problem.budget = cut
    with pytest.raises(BudgetSpent):
        run(problem)
    assert len(problem.trials) == cut
    problem.budget = 10_000
    run(problem)
    assert problem.asked == whole.asked


@contract
def test_where_nothing_meets_the_goal_it_ends(run):
    problem = SyntheticProblem(1)
    problem.drop = lambda mix: 0.5
    run(problem)
    assert problem.best() is None
    assert len(problem.trials) <= (12 if run in DIRECTED.values() else N + 1)


@contract
def test_a_trial_that_fails_is_a_miss(run):
    problem = SyntheticProblem(2)
    measure, failed = problem.measure, []

    def fails_once(point, label=""):
        if not failed:
            failed.append(dict(point))
        return None if dict(point) == failed[0] else measure(point, label)

    problem.measure = fails_once
    run(problem)
    assert problem.best() is not None
    assert failed[0] not in [dict(key) for key in problem.trials]


def equal_scores(problem):
    problem.scores = [1.0] * problem.count


def nan_score(problem):
    problem.scores[problem.bad[0]] = math.nan


def met_by_all_int8(problem):
    problem.loss = [0.0] * problem.count


def as_it_is(problem):
    pass


CASES = {
    "one operator": (SyntheticProblem, {"count": 1, "bad": 1}, as_it_is),
    "no operator": (SyntheticProblem, {"count": 0}, as_it_is),
    "equal scores": (SyntheticProblem, {}, equal_scores),
    "a NaN score": (SyntheticProblem, {}, nan_score),
    "met by all int8": (SyntheticProblem, {}, met_by_all_int8),
}


@contract
@pytest.mark.parametrize(("make", "options", "change"), CASES.values(), ids=CASES)
def test_it_ends_with_every_mix_measured_once_and_the_goal_met(run, make, options, change):
    problem = make(4, **options)
    change(problem)
    run(problem)
    points = [dict(point) for point in problem.asked]
    assert len(points) <= problem.count + 1
    mixes = [problem.mix(point) for point in points]
    assert len(mixes) == len(set(mixes))
    for mix in (problem.all_int8, problem.all_int16):  # a study has both, so that a strategy need not measure them
        problem.measure({ASSIGNMENT: mix})
    assert problem.best() is not None


def explored(problem, budget):
    """Mixes of a search that goes on to the front until its trials are spent."""
    problem.budget = budget
    int8, int16 = problem.drop(problem.all_int8), problem.drop(problem.all_int16)
    with pytest.raises(BudgetSpent):
        assign(problem.measure, {}, problem.assignment, max_drop=GOAL, int8_drop=int8, int16_drop=int16)
    return [problem.mix(dict(point)) for point in problem.asked]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_exploring_leaves_no_mix_of_the_solver_better_than_the_front(seed):
    problem = SyntheticProblem(seed, bad=6)
    mixes = explored(problem, 40)
    assert len(set(mixes)) == 40
    ends = {"8" * N, "6" * N}
    assert not ends & set(mixes)
    solver = problem.assignment
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        wanted = solver.cheapest(solver.budget(share))
        at_most = [m for m in {*mixes, *ends} if problem.drop(m) <= problem.drop(wanted) + 0.01]
        assert min(map(problem.price, at_most)) <= problem.price(wanted) + 0.1


@pytest.mark.slow
def test_exploring_does_not_pay_more_than_all_int16():
    problem = SyntheticProblem(0, bad=6, cast=0.3)  # most mixes do not pay
    goal = len(explored(problem, 12))
    mixes = explored(problem, 40)
    dear = [m for m in mixes[goal:] if problem.price(m) > problem.price("6" * N)]
    assert len(dear) <= 2


def test_a_search_that_explores_goes_on_where_it_was_cut():
    whole, problem = SyntheticProblem(3, bad=5), SyntheticProblem(3, bad=5)
    mixes = explored(whole, 30)
    explored(problem, 17)
    assert explored(problem, 30) == mixes


def test_accuracy_that_is_not_monotone_does_not_hide_a_lower_value():
    problem = SyntheticProblem(0)
    meeting = {2, 5, 6, 7, 8, 16, 20}
    problem.drop = lambda mix: 0.0 if mix.count("6") in meeting else 0.1
    run_ratio(problem)
    assert problem.mix(problem.best().params).count("6") == 2


def demoted(mix, meets_, missed=(), price=None, gains=None):
    """(the mix that `demote` leaves of `mix`, the mixes that it measured)."""
    asked = []
    price = price or (lambda m: float(m.count("6")))
    gains = gains or range(1, len(mix) + 1)
    operators = tuple(Operator(str(i), float(gain), 0.0, i) for i, gain in enumerate(gains))
    problem = Problem(operators, cost_terms(price, "6" * len(mix), []), len(mix))

    def ask(lower, label):
        asked.append(lower)
        drop = 0.0 if meets_(lower) else 1.0
        return FinishedTrial(0, "", {}, label, Outcome((drop,), {CONSTRAINT: drop}, {}, {}), 0.0)

    return demote(ask, problem, mix, patience=2, missed=missed), asked


def test_all_int8_is_tried_first_unless_it_is_known_to_miss():
    assert demoted("6666", lambda mix: True) == ("8888", ["8888"])
    assert demoted("6888", lambda mix: True) == ("8888", ["8888"])
    assert demoted("6888", lambda mix: True, missed=["8888"]) == ("6888", [])


def test_demotion_goes_on_singly_up_to_the_last_operator():
    assert demoted("6666", lambda mix: True, missed=["8888"]) == ("8886", ["8866", "8886"])
    assert demoted("6666", lambda mix: mix != "8888") == ("8886", ["8888", "8866", "8886"])


@given(st.sets(st.sampled_from("abcdef")), st.permutations("abcdef"))
def test_what_is_left_out_is_all_that_the_goal_does_not_need(needed, order):
    kept = set(order)

    def without(group):
        nonlocal kept
        if needed <= kept - set(group):
            kept -= set(group)
            return True
        return False

    leave_out(order, without, patience=len(order))
    assert kept == needed


def test_patience_counts_operators_that_prove_needed():
    left, asked = demoted("666666", lambda mix: mix == "666666")
    assert left == "666666"
    assert asked == ["888888", "888666", "866666", "686666"]


def test_a_demotion_never_costs_more():
    price = lambda mix: mix.count("6") + (5.0 if mix.startswith("8") and mix[1] == "6" else 0.0)  # noqa: E731
    left, asked = demoted("6666", lambda mix: mix[3] == "6" and mix[1] == "6", price=price)
    assert left == "6686"
    assert not [mix for mix in asked if mix.startswith("86")]


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
    asked.clear()
    (found,) = halving(
        measure, [{"qat.learning_rate": r} for r in (0.1, 0.2, 0.3)], [10, 20], lambda t: t.outcome.objectives[0] >= 2.0
    )
    assert (found.params["qat.learning_rate"], asked) == (0.2, [(0.1, 10), (0.2, 10)])  # enough: no other is trained


@pytest.mark.parametrize(("name", "workers"), [("ratio", 2), ("ratio", 5), ("assign", 3)])
def test_with_workers_independent_points_come_at_once_and_lead_to_the_same_goal(name, workers):
    alone, together = SyntheticProblem(1, bad=4), SyntheticProblem(1, bad=4)
    DIRECTED[name](alone)
    rounds = []

    def measure_all(points):
        fresh = [point for point, label in points if tuple(sorted(point.items())) not in together.trials]
        rounds.append(len(fresh))
        for point, label in points:
            together.measure(point, label)

    DIRECTED[name](together, AtOnce(workers, measure_all))
    assert 1 < max(rounds) <= workers
    assert len(together.trials) - sum(rounds) + len(rounds) < len(alone.trials)  # fewer waits than one by one
    assert together.asked[0] == alone.asked[0]
    if name == "ratio":
        assert together.best().params == alone.best().params
    assert meets(together.best())
