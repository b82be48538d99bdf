"""Optuna's importances on the points that were measured, and the noise of a difference."""

import math
from statistics import pstdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.study_records import SPACE, trial, trials

from qflow.search.importance import FANOVA, PED_ANOVA, importances
from qflow.search.noise import BINOMIAL, PAIRED, difference_noise

METRICS = ["accuracy/drop", "cost/latency_ms"]


def test_the_key_that_decides_comes_first_for_both_evaluators():
    found = importances(SPACE, trials(60), METRICS)
    assert {name for name, _ in found.shares} == {FANOVA, PED_ANOVA} and not found.reason
    assert found.keys[0] == "qconfig.int16_ratio"
    for shares in found.shares.values():
        assert sum(shares.values()) == pytest.approx(1.0) and shares["qconfig.int16_ratio"] > 0.5
    assert found.shares[FANOVA, "cost/latency_ms"]["calibration.steps"] < 0.01


def test_few_trials_or_parameters_say_so_instead_of_figures():
    assert "20 finished trials are needed" in importances(SPACE, trials(12), METRICS).reason
    same = [trial(i, 0.001 * i, 0.7, params={"qconfig.int16_ratio": i / 30}) for i in range(30)]
    assert "Fewer than two parameters" in importances(SPACE, same, METRICS).reason


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


def test_noise_of_a_metric_that_counts_nothing_is_not_known():
    assert not difference_noise(27.31, 26.9, 100).known
    assert not difference_noise(0.91234, 0.9, 100).known  # no whole number of samples
