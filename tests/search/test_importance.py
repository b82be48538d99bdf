"""Optuna's importances on the points that were measured, and the noise of a difference."""

import math
from dataclasses import replace
from statistics import pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.study_records import SPACE, trial, trials

from qflow.search.domain import Choice, Condition, Interval
from qflow.search.importance import FANOVA, PED_ANOVA, importances
from qflow.search.noise import BINOMIAL, BY_SEQUENCE, PAIRED, Margin, Noise, difference_noise
from qflow.search.objective import MAXIMIZE, MINIMIZE

METRICS = {"accuracy/drop": MINIMIZE, "cost/latency_ms": MINIMIZE}


def test_the_key_that_decides_comes_first_for_both_evaluators():
    found = importances(SPACE, trials(60), METRICS)
    assert {name for name, _ in found.shares} == {FANOVA, PED_ANOVA} and not found.reason
    assert found.keys[0] == "qconfig.int16_ratio"
    for shares in found.shares.values():
        assert sum(shares.values()) == pytest.approx(1.0) and shares["qconfig.int16_ratio"] > 0.5
    assert found.shares[FANOVA, "cost/latency_ms"]["calibration.steps"] < 0.01


def test_few_trials_or_parameters_say_so_instead_of_figures():
    assert "20 finished trials are needed" in importances(SPACE, trials(12), METRICS).reason
    rest = {"calibration.method": "mse", "calibration.steps": 16}
    same = [trial(i, 0.001 * i, 0.7, params={"qconfig.int16_ratio": i / 30, **rest}) for i in range(30)]
    assert "Fewer than two parameters" in importances(SPACE, same, METRICS).reason


def test_the_share_of_a_mix_that_a_strategy_chose_is_the_measured_one():
    sampled = trials(60)
    as_mixes = [
        replace(t, params={**t.params, "qconfig.int16_ratio": 0.0, "qconfig.assignment": "86"}) for t in sampled
    ]
    shares = [float(t.params["qconfig.int16_ratio"]) for t in sampled]
    known = [
        replace(t, outcome=replace(t.outcome, metrics={**t.outcome.metrics, "qconfig/int16_ratio": share}))
        for t, share in zip(as_mixes, shares, strict=True)
    ]
    assert importances(SPACE, known, METRICS) == importances(SPACE, sampled, METRICS)


def test_trials_without_a_searched_key_are_left_out_and_the_key_stays():
    lacking = {"calibration.method": "mse", "calibration.steps": 16}
    demoted = [trial(100 + i, 0.002, 0.6 + 0.001 * i, "demoted", params=lacking) for i in range(5)]
    assert importances(SPACE, [*trials(60), *demoted], METRICS) == importances(SPACE, trials(60), METRICS)
    few = importances(SPACE, [*trials(17), *demoted], METRICS)
    assert not few.shares and "there are 17; 5 more lack a searched key" in few.reason


def test_a_key_with_a_condition_is_left_out_where_trials_lack_it():
    only = (Condition("calibration.method", Choice(("mse",))),)
    space = {**SPACE, "calibration.stride": Interval(0.0, 9.0, when=only)}
    some = [replace(t, params={**t.params, "calibration.stride": float(t.number)}) for t in trials(10)]
    assert importances(space, [*some, *trials(40)[10:]], METRICS) == importances(SPACE, trials(40), METRICS)


def test_the_best_tenth_of_a_maximized_cost_is_its_largest():
    """`a` decides among the largest values, `b` among the smallest."""
    space = {"a": Interval(0.0, 1.0), "b": Interval(0.0, 1.0)}
    random, made = np.random.default_rng(0), []
    for number in range(200):
        a, b = (float(v) for v in random.uniform(size=2))
        fps = 10.0 + a if a > 0.7 else b - 10.0 if b < 0.3 else 5.0 * float(random.uniform())
        made.append(trial(number, 0.01, 0.7, params={"a": a, "b": b}, **{"cost/fps": fps}))
    most = importances(space, made, {"cost/fps": MAXIMIZE}).shares[PED_ANOVA, "cost/fps"]
    least = importances(space, made, {"cost/fps": MINIMIZE}).shares[PED_ANOVA, "cost/fps"]
    assert most["a"] > 0.9 and least["b"] > 0.9


def test_the_same_trials_give_the_same_shares():
    assert importances(SPACE, trials(40), METRICS) == importances(SPACE, trials(40), METRICS)


@given(st.integers(5, 400), st.integers(0, 10**6))
def test_paired_noise_is_the_spread_of_the_differences_over_the_root_of_their_number(count, seed):
    random = np.random.default_rng(seed)
    a, b = random.uniform(size=count).tolist(), random.uniform(size=count).tolist()
    found = difference_noise(float(np.mean(a)), float(np.mean(b)), count, (a, b))
    spread = pstdev([x - y for x, y in zip(a, b, strict=True)])
    assert found.how == PAIRED and found.error == pytest.approx(spread / math.sqrt(count - 1))


def test_the_binomial_bound_is_larger_than_the_paired_noise_of_alike_models():
    hits = np.random.default_rng(0).uniform(size=1000) < 0.9
    worse = hits & (np.arange(1000) % 50 != 0)
    pair = hits.astype(float).tolist(), worse.astype(float).tolist()
    shares = float(hits.mean()), float(worse.mean())
    bound, paired = difference_noise(*shares, 1000), difference_noise(*shares, 1000, pair)
    assert bound.how == BINOMIAL and paired.known and 0.0 < paired.error < 0.5 * bound.error


def test_frames_of_a_sequence_count_as_one():
    """Frames that repeat their first one tell nothing new: the noise is that of the sequences alone."""
    random = np.random.default_rng(0)
    a, b = random.uniform(size=(2, 12))
    of_means = difference_noise(float(a.mean()), float(b.mean()), 12, (a.tolist(), b.tolist()))
    frames = a.repeat(10).tolist(), b.repeat(10).tolist()
    found = difference_noise(float(a.mean()), float(b.mean()), 120, frames, [10] * 12)
    assert found.how == BY_SEQUENCE and found.error == pytest.approx(of_means.error)
    assert difference_noise(float(a.mean()), float(b.mean()), 120, frames).error < 0.4 * found.error


def test_no_miss_among_few_samples_is_no_sure_share():
    assert difference_noise(1.0, 1.0, 20).error == difference_noise(0.0, 0.0, 20).error == 0.05
    assert difference_noise(1.0, 1.0, 20, sequences=[5] * 4).error == 0.25


def test_a_margin_says_its_noise_and_whether_it_is_larger():
    thin, wide = (Margin(distance, Noise(0.00325, PAIRED)) for distance in (-0.0028, 0.02))
    assert str(thin) == "0.0028, noise 0.0065 (two standard errors, paired by sample)"
    assert not thin.sure and wide.sure
    assert not Margin(0.5, Noise(math.inf, "not known")).sure


def test_noise_of_a_metric_that_counts_nothing_is_not_known():
    assert not difference_noise(27.31, 26.9, 100).known
    assert not difference_noise(0.91234, 0.9, 100).known  # no whole number of samples
