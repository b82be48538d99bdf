"""Every strategy under one contract, on a landscape whose culprits and optimum are known."""

from __future__ import annotations

import math
import random
import tempfile
import threading
from pathlib import Path

import optuna
import pytest

from qflow.core.errors import TrialError
from qflow.search.assign import Operator, Problem
from qflow.search.cost_terms import cost_terms
from qflow.search.domain import Choice
from qflow.search.loop import Driver
from qflow.search.objective import CONSTRAINT, best_trial
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign, demote, halving, raise_until_met
from qflow.search.study import Study, _sampler

RATIO = "qconfig.int16_ratio"
N, GOAL = 20, 0.01


class Surrogate:
    """Operators with a loss each and a price; drops add up, with a wobble that scores do not know."""

    def __init__(self, seed=0, culprits=3, wobble=0.0, count=N, cast=0.0):
        rng = random.Random(seed)
        self.count, self.cast = count, cast
        self.loss = [rng.uniform(0, 2e-4) for _ in range(count)]
        self.culprits = sorted(rng.sample(range(count), min(culprits, count)))
        for i in self.culprits:
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
    def problem(self):
        operators = tuple(Operator(str(i), score, score / 256, i) for i, score in enumerate(self.scores))
        neighbours = [(i, i + 1) for i in range(self.count - 1)]
        return Problem(operators, cost_terms(lambda mix: self.price(mix), self.all_int16, neighbours), self.count)

    def best(self):
        return best_trial(list(self.trials.values()))

    def promoted(self):
        return [i for i, letter in enumerate(self.mix(self.best().params)) if letter == "6"]


def run_ratio(land):
    raise_until_met(land.measure, {}, RATIO, [k / (land.count or 1) for k in range(land.count + 1)])


def run_assign(land):
    int8, int16 = land.drop(land.all_int8), land.drop(land.all_int16)
    assign(land.measure, {}, land.problem, max_drop=GOAL, int8_drop=int8, int16_drop=int16, explore=False)


class NoTracker:
    """A tracker that keeps nothing."""

    def start_trial(self, study_run_id, study, number, label):
        return str(number)

    def upload(self, run_id, folder):
        return []

    def commit(self, *_):
        pass

    end = commit


def run_optuna(land):
    """The sampler over the ratio, as the session drives it: until the space or the budget is used up."""
    if land.driver is None:
        shares = tuple(dict.fromkeys(k / (land.count or 1) for k in range(land.count + 1)))
        inner = optuna.create_study(directions=["maximize", "minimize"], sampler=_sampler("tpe", 0, len(shares)))
        study = Study(inner, {RATIO: Choice(shares)}, ("maximize", "minimize"), Path())

        def evaluate(params, folder):
            trial = land.measure(params)
            if trial is None:
                raise TrialError("it fails")
            return trial.outcome

        nothing = lambda _: None  # noqa: E731
        scratch = Path(tempfile.mkdtemp())
        land.driver = Driver(study, NoTracker(), evaluate, "", scratch, nothing, nothing, threading.Event())
    while True:
        if len(land.driver.finished) >= land.budget:
            raise BudgetSpent("search.n_trials")
        if land.driver.sample() is None:
            return


DIRECTED = {"ratio": run_ratio, "assign": run_assign}
CONTRACT = {**DIRECTED, "optuna": run_optuna}
contract = pytest.mark.parametrize("run", CONTRACT.values(), ids=CONTRACT)
directed = pytest.mark.parametrize("run", DIRECTED.values(), ids=DIRECTED)


@contract
@pytest.mark.parametrize("cast", [0.0, 0.03], ids=["additive", "casts"])
@pytest.mark.parametrize("seed", range(4))
def test_the_planted_operators_are_promoted(run, seed, cast):
    land = Surrogate(seed, cast=cast)
    run(land)
    assert set(land.culprits) <= set(land.promoted())
    assert len(land.trials) <= N + 1


@directed
@pytest.mark.parametrize("seed", range(8))
def test_nothing_but_the_culprits_is_promoted_in_few_trials(run, seed):
    land = Surrogate(seed)
    run(land)
    assert land.promoted() == land.culprits
    assert len(land.trials) <= 8


@pytest.mark.slow
@contract
@pytest.mark.parametrize("seed", range(8))
def test_scores_that_are_wrong_by_half_still_lead_to_the_goal(run, seed):
    land = Surrogate(seed, culprits=6, wobble=0.5)
    run(land)
    assert set(land.culprits) <= set(land.promoted())


@contract
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_search_that_is_cut_goes_on_as_if_it_had_not_been(run, cut):
    whole, land = Surrogate(3, culprits=5), Surrogate(3, culprits=5)
    run(whole)
    land.budget = cut
    with pytest.raises(BudgetSpent):
        run(land)
    assert len(land.trials) == cut
    land.budget = 10_000
    run(land)
    assert land.asked == whole.asked


@contract
def test_where_nothing_meets_the_goal_it_ends(run):
    land = Surrogate(1)
    land.drop = lambda mix: 0.5
    run(land)
    assert land.best() is None
    assert len(land.trials) <= (12 if run in DIRECTED.values() else N + 1)


@contract
def test_a_trial_that_fails_is_a_miss(run):
    land = Surrogate(2)
    measure, failed = land.measure, []

    def fails_once(point, label=""):
        if not failed:
            failed.append(dict(point))
        return None if dict(point) == failed[0] else measure(point, label)

    land.measure = fails_once
    run(land)
    assert land.best() is not None
    assert failed[0] not in [dict(key) for key in land.trials]


def equal_scores(land):
    land.scores = [1.0] * land.count


def nan_score(land):
    land.scores[land.culprits[0]] = math.nan


def met_by_all_int8(land):
    land.loss = [0.0] * land.count


def as_it_is(land):
    pass


CASES = {
    "one operator": (Surrogate, {"count": 1, "culprits": 1}, as_it_is),
    "no operator": (Surrogate, {"count": 0}, as_it_is),
    "equal scores": (Surrogate, {}, equal_scores),
    "a NaN score": (Surrogate, {}, nan_score),
    "met by all int8": (Surrogate, {}, met_by_all_int8),
}


@contract
@pytest.mark.parametrize(("make", "options", "change"), CASES.values(), ids=CASES)
def test_it_ends_with_every_mix_measured_once_and_the_goal_met(run, make, options, change):
    land = make(4, **options)
    change(land)
    run(land)
    points = [dict(point) for point in land.asked]
    assert len(points) <= land.count + 1
    mixes = [land.mix(point) for point in points]
    assert len(mixes) == len(set(mixes))
    for mix in (land.all_int8, land.all_int16):  # a study has both, so that a strategy need not measure them
        land.measure({ASSIGNMENT: mix})
    assert land.best() is not None


def explored(land, budget):
    """Mixes of a search that goes on to the front until its trials are spent."""
    land.budget = budget
    int8, int16 = land.drop(land.all_int8), land.drop(land.all_int16)
    with pytest.raises(BudgetSpent):
        assign(land.measure, {}, land.problem, max_drop=GOAL, int8_drop=int8, int16_drop=int16)
    return [land.mix(dict(point)) for point in land.asked]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_exploring_leaves_no_mix_of_the_solver_better_than_the_front(seed):
    land = Surrogate(seed, culprits=6)
    mixes = explored(land, 40)
    assert len(set(mixes)) == 40
    ends = {"8" * N, "6" * N}
    assert not ends & set(mixes)
    problem = land.problem
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        wanted = problem.cheapest(problem.budget(share))
        at_most = [m for m in {*mixes, *ends} if land.drop(m) <= land.drop(wanted) + 0.01]
        assert min(map(land.price, at_most)) <= land.price(wanted) + 0.1


@pytest.mark.slow
def test_exploring_does_not_pay_more_than_all_int16():
    land = Surrogate(0, culprits=6, cast=0.3)  # most mixes do not pay
    goal = len(explored(land, 12))
    mixes = explored(land, 40)
    dear = [m for m in mixes[goal:] if land.price(m) > land.price("6" * N)]
    assert len(dear) <= 2


def test_a_search_that_explores_goes_on_where_it_was_cut():
    whole, land = Surrogate(3, culprits=5), Surrogate(3, culprits=5)
    mixes = explored(whole, 30)
    explored(land, 17)
    assert explored(land, 30) == mixes


def test_accuracy_that_is_not_monotone_does_not_hide_a_lower_value():
    land = Surrogate(0)
    meeting = {2, 5, 6, 7, 8, 16, 20}
    land.drop = lambda mix: 0.0 if mix.count("6") in meeting else 0.1
    run_ratio(land)
    assert land.mix(land.best().params).count("6") == 2


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


def test_giving_back_goes_on_singly_up_to_the_last_operator():
    assert demoted("6666", lambda mix: True, missed=["8888"]) == ("8886", ["8866", "8886"])
    assert demoted("6666", lambda mix: mix != "8888") == ("8886", ["8888", "8866", "8886"])


def test_patience_counts_operators_that_prove_needed():
    left, asked = demoted("666666", lambda mix: mix == "666666")
    assert left == "666666"
    assert asked == ["888888", "888666", "866666", "686666"]


def test_what_is_given_back_is_never_dearer():
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
