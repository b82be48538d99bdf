"""The goal and its budgets: what meets, what wins, what comes nearest. An absent measurement never wins."""

import pytest

from qflow.core.errors import ConfigError
from qflow.search.objective import Goal, accurate, best_trial, meets, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial, Outcome

GOAL = Goal(0.01, max_latency_ms=1.0, max_int16_mac_share=0.5)


def trial(number, drop, latency, share=0.0, goal=GOAL):
    metrics = {"accuracy/drop": drop, "cost/latency_ms": latency, "cost/int16_mac_share": share}
    outcome = Outcome((0.9, latency), goal.constraints(metrics), {}, metrics)
    return FinishedTrial(number, f"run{number}", {}, "", outcome, 1.0)


def test_a_trial_meets_the_goal_within_every_budget():
    assert meets(trial(0, 0.01, 1.0, 0.5))  # equality on paper is equality here
    assert not meets(trial(0, 0.011, 0.5))
    assert over_budget(trial(0, 0.0, 1.25)) == {"max_latency_ms": 0.25}
    assert accurate(trial(0, 0.0, 1.25)) and not meets(trial(0, 0.0, 1.25))
    assert not meets(trial(0, 0.0, 0.5, share=0.6))


def test_a_budget_that_is_not_measured_is_not_kept():
    assert not meets(trial(0, 0.0, float("nan")))
    with pytest.raises(KeyError):
        GOAL.constraints({"accuracy/drop": 0.0})


def test_the_cheapest_within_the_budgets_wins():
    trials = [trial(0, 0.0, 0.9), trial(1, 0.009, 0.8), trial(2, 0.0, 0.5, share=0.9), trial(3, 0.5, 0.1)]
    assert best_trial(trials).number == 1
    assert best_trial(trials[2:]) is None


def test_the_nearest_miss_keeps_the_budgets_where_one_can():
    assert nearest_miss([trial(0, 0.0, 2.0), trial(1, 0.02, 0.5), trial(2, 0.03, 0.4)]).number == 1
    assert nearest_miss([trial(0, 0.0, 2.0), trial(1, 0.0, 3.0), trial(2, 0.5, 4.0)]).number == 0


def test_a_goal_without_budgets_is_the_drop_alone():
    assert Goal(0.01).constraints({"accuracy/drop": 0.03}) == {"accuracy_drop": pytest.approx(0.02)}
    assert str(GOAL) == "drop of at most 0.01, max_latency_ms 1, max_int16_mac_share 0.5"


@pytest.mark.parametrize("name", ["max_latency_ms", "max_int16_mac_share", "max_traffic_mb"])
def test_a_budget_below_zero_is_refused(name):
    with pytest.raises(ConfigError, match=f"objective.{name} is a number of at least 0, but got -1"):
        Goal(0.01, **{name: -1.0})
