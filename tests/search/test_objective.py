"""The goal and its budgets: what meets, what wins, what comes nearest. An absent measurement never wins."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.errors import ConfigError
from qflow.search.objective import (
    Goal,
    accurate,
    aims,
    best_trial,
    dominates,
    meets,
    nearest_miss,
    over_budget,
    pareto_set,
    ranked,
)
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.standing import Standing

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


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.02, 0.5]), st.sampled_from([0.5, 1.0, 2.0])), min_size=1))
def test_the_first_in_rank_is_the_best_or_the_nearest_miss(rows):
    trials = [trial(number, *row) for number, row in enumerate(rows)]
    order = ranked(trials)
    assert sorted(t.number for t in order) == [t.number for t in trials]
    assert order[0] is (best_trial(trials) or nearest_miss(trials))
    standing = Standing()
    assert [standing.after([t]).best for t in trials][-1] is best_trial(trials)
    met = [meets(t) for t in order]
    assert met == sorted(met, reverse=True)  # whatever misses comes after all that meets
    latencies = [t.outcome.metrics["cost/latency_ms"] for t in order if meets(t)]
    assert latencies == sorted(latencies)


def test_a_goal_without_budgets_is_the_drop_alone():
    assert Goal(0.01).constraints({"accuracy/drop": 0.03}) == {"accuracy_drop": pytest.approx(0.02)}
    assert str(GOAL) == "drop of at most 0.01, max_latency_ms 1, max_int16_mac_share 0.5"


@pytest.mark.parametrize("name", ["max_latency_ms", "max_slowdown", "max_int16_mac_share", "max_traffic_mb"])
def test_a_budget_below_zero_is_refused(name):
    with pytest.raises(ConfigError, match=f"objective.{name} is a number of at least 0, but got -1"):
        Goal(0.01, **{name: -1.0})


def test_a_slowdown_is_a_budget_in_units_of_all_int8():
    goal = Goal(0.01, max_slowdown=1.1)
    assert str(goal) == "drop of at most 0.01, max_slowdown 1.1"
    assert goal.constraints({"accuracy/drop": 0.0, "cost/slowdown": 1.1})["max_slowdown"] == 0.0
    assert goal.constraints({"accuracy/drop": 0.0, "cost/slowdown": 1.3})["max_slowdown"] == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="max_slowdown is a factor of at least 1, .* but got 0.9"):
        Goal(0.01, max_slowdown=0.9)


KNOWN = ("accuracy/map", "accuracy/drop", "cost/latency_ms", "cost/traffic_mb", "cost/fps")


def measured(number, drop, **metrics):
    found = {"accuracy/drop": drop, **{f"cost/{name}": value for name, value in metrics.items()}}
    return FinishedTrial(number, f"run{number}", {}, "", Outcome((), Goal(0.01).constraints(found), {}, found), 1.0)


def test_objectives_are_those_named_in_their_order_or_metric_and_latency():
    goal = Goal(0.01).aimed("accuracy/map", "maximize", KNOWN)
    assert goal.optimize == {"accuracy/map": "maximize", "cost/latency_ms": "minimize"}
    assert goal.objectives({"accuracy/map": 0.7, "cost/latency_ms": 2.0}) == (0.7, 2.0)
    assert (aims(goal), goal.ranking) == ("most accuracy/map, least cost/latency_ms", {"cost/latency_ms": "minimize"})
    own = Goal(0.01, optimize={"cost/fps": "maximize", "accuracy/drop": "minimize"})
    assert own.aimed("accuracy/map", "maximize", KNOWN) == own
    assert own.ranking == {"cost/fps": "maximize"}
    assert math.isnan(own.objectives({"cost/fps": 3.0})[1])  # what was not measured fails the trial
    assert Goal(0.01, optimize={"accuracy/drop": "minimize"}).ranking == {}


def test_an_unknown_metric_is_refused_with_those_that_exist():
    says = r"but got cost/latency\. Did you mean cost/latency_ms\? There are: accuracy/map, .*, cost/fps"
    with pytest.raises(ConfigError, match=says) as caught:
        Goal(0.01, optimize={"cost/latency": "minimize"}).aimed("accuracy/map", "maximize", KNOWN)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="maximize or minimize, but got 'less'"):
        Goal(0.01, optimize={"cost/fps": "less"})
    with pytest.raises(ConfigError, match="a share of at most 1, but got 50"):
        Goal(0.01, max_int16_mac_share=50)


def test_the_best_is_told_by_which_metrics_to_rank():
    trials = [
        measured(0, 0.001, latency_ms=3.0, fps=10.0, traffic_mb=1.0),
        measured(1, 0.002, latency_ms=2.0, fps=10.0, traffic_mb=2.0),
        measured(2, 0.000, latency_ms=2.0, fps=20.0, traffic_mb=2.0),
        measured(3, 0.500, latency_ms=0.1, fps=99.0, traffic_mb=0.1),
        measured(4, 0.003, latency_ms=5.0),
    ]
    assert best_trial(trials).number == 2  # of equal latency the more accurate
    assert best_trial(trials, {"cost/traffic_mb": "minimize"}).number == 0
    assert best_trial(trials, {"cost/fps": "maximize", "cost/latency_ms": "minimize"}).number == 2
    assert best_trial(trials, {}).number == 2  # accuracy alone
    assert best_trial(trials[4:], {"cost/fps": "maximize"}).number == 4
    assert best_trial([trials[4], trials[1]], {"cost/fps": "maximize"}).number == 1  # absent never wins
    assert nearest_miss([measured(0, 0.5, fps=1.0), measured(1, 0.5, fps=2.0)], {"cost/fps": "maximize"}).number == 1
    assert nearest_miss([measured(0, 0.6), measured(1, 0.5)], {}).number == 1
    assert nearest_miss([], {}) is None


def with_objectives(number, objectives):
    return FinishedTrial(number, f"run{number}", {}, "", Outcome(tuple(objectives), {}, {}, {}), 1.0)


@given(st.data(), st.lists(st.sampled_from(("maximize", "minimize")), min_size=1, max_size=3))
def test_the_pareto_set_is_what_nothing_dominates(data, directions):
    values = st.one_of(st.integers(0, 3), st.just(math.nan))
    points = data.draw(st.lists(st.lists(values, min_size=len(directions), max_size=len(directions)), max_size=12))
    trials = [with_objectives(i, point) for i, point in enumerate(points)] + [with_objectives(99, ())]
    members = pareto_set(trials, directions)
    standing = Standing(ways=directions)
    for count in range(0, len(trials) + 1, 2):
        standing.after(trials[:count])
    assert standing.after(trials).front == members

    def costs(trial):
        return [-v if d == "maximize" else v for v, d in zip(trial.outcome.objectives, directions, strict=True)]

    known = [t for t in trials if t.outcome.objectives and not any(map(math.isnan, t.outcome.objectives))]
    assert all(member in known for member in members)
    assert bool(members) == bool(known)
    for trial in known:
        dominated = any(
            all(a <= b for a, b in zip(costs(o), costs(trial), strict=True))
            and any(a < b for a, b in zip(costs(o), costs(trial), strict=True))
            for o in known
        )
        assert (trial in members) == (not dominated)
    for trial in (t for t in known if t not in members):
        assert any(dominates(costs(member), costs(trial)) for member in members)


def test_at_equal_cost_the_fewer_promoted_operators_win_then_the_smaller_drop():
    def mix(number, drop, latency=0.5, **promoted):
        counts = {f"qconfig/n_{name}": float(count) for name, count in promoted.items()}
        metrics = {"accuracy/drop": drop, "cost/latency_ms": latency, "cost/int16_mac_share": 0.0, **counts}
        return FinishedTrial(number, "", {}, "", Outcome((0.9, latency), GOAL.constraints(metrics), {}, metrics), 1.0)

    two, one, weight = mix(0, 0.0, int16=2), mix(1, 0.005, int16=1), mix(2, 0.005, int16=0, int16_weights=2)
    assert best_trial([two, one, weight]) is one
    assert best_trial([two, weight, mix(3, 0.001, int16=1, int16_weights=1)]).number == 0  # of equal counts: the drop
    assert best_trial([one, mix(4, 0.0, int16=0, float16=2)]) is one
    assert best_trial([one, mix(5, 0.009, latency=0.5 + 1e-12)]).number == 5  # sums in another order are no difference
    assert best_trial([one, mix(6, 0.009, latency=0.51)]) is one
    assert best_trial([one, two], {}) is two  # accuracy alone: the drop comes first
    assert nearest_miss([mix(7, 0.5, int16=3), mix(8, 0.5, int16=1)]).number == 8


@given(
    st.permutations(
        [(n, drop, ms, k) for n, (drop, ms, k) in enumerate([(0.0, 0.5, 2), (0.002, 0.5, 1), (0.0, 0.6, 0)])]
    )
)
def test_the_best_does_not_depend_on_the_order_of_the_trials(rows):
    trials = []
    for number, drop, ms, count in rows:
        metrics = {"accuracy/drop": drop, "cost/latency_ms": ms, "cost/int16_mac_share": 0.0, "qconfig/n_int16": count}
        trials.append(FinishedTrial(number, "", {}, "", Outcome((), GOAL.constraints(metrics), {}, metrics), 1.0))
    assert best_trial(trials).number == 1
