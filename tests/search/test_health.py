"""The health of a study: each check has a study that it finds fine, and one that it warns of."""

from dataclasses import replace

import pytest
from support.study_records import GOAL, SPACE, record, trial

from qflow.search.health import (
    FINE,
    LOOK,
    UNKNOWN,
    Searched,
    beats_baselines,
    border,
    calibrated,
    failures,
    feasible,
    health,
    influence,
    resolution,
)
from qflow.search.importance import FANOVA, Importances
from qflow.search.objective import Goal
from qflow.search.outcome import STOPPED, FailedTrial

INT16, INT8 = trial(0, 0.001, 0.81, "all-int16"), trial(1, 0.04, 0.61, "all-int8")
BEST = trial(2, 0.002, 0.66)


def searched(*trials, **more):
    base = {
        "space": SPACE, "goal": GOAL, "trials": [INT16, INT8, *trials], "failed": [], "accuracy": "accuracy/found",
        "baselines": {"all-int16": INT16, "all-int8": INT8}, "float_metric": 0.91, "samples": 1000,
        "calibration": (16, 256),
    }  # fmt: skip
    return Searched(**{**base, **more})


def at(ratio, **more):
    return trial(2, 0.002, 0.66, params={"calibration.method": "mse", "qconfig.int16_ratio": ratio, **more})


def test_the_border_of_an_interval_is_named_with_the_value():
    space = {**SPACE, "qat.learning_rate": replace(SPACE["qconfig.int16_ratio"], low=1e-6, high=1e-3)}
    assert border(searched(at(0.3, **{"qat.learning_rate": 5e-4}), space=space)).state == FINE
    found = border(searched(at(0.3, **{"qat.learning_rate": 1e-3}), space=space))
    assert found.state == LOOK and "qat.learning_rate (its largest value 0.001)" in found.text


def test_the_border_of_a_log_interval_is_measured_on_its_scale():
    rate = replace(SPACE["qconfig.int16_ratio"], low=1e-6, high=1e-3, log=True)
    space = {**SPACE, "qat.learning_rate": rate}
    states = {v: border(searched(at(0.3, **{"qat.learning_rate": v}), space=space)).state for v in (1.1e-6, 1e-5, 9e-4)}
    assert states == {1.1e-6: LOOK, 1e-5: FINE, 9e-4: LOOK}


def test_trials_that_ended_early_are_no_result():
    """Their drop is the worst possible one, which misses every goal and is nobody's rival."""
    strict = Goal(0.0005).aimed("accuracy/found", "maximize", ("accuracy/found", "cost/latency_ms"))
    early = trial(2, 0.0001, 0.1, goal=strict, tags={STOPPED: "after 100 of 1000 samples"})
    found = searched(trials=[trial(0, 0.001, 0.7, goal=strict), trial(1, 0.04, 0.7, goal=strict), early], goal=strict)
    assert found.shown.number == 0 and found.best is None
    assert feasible(replace(found, baselines={})).text.startswith("The least drop is 0.001")


def test_no_and_all_operators_are_natural_borders():
    assert border(searched(at(0.0))).state == border(searched(at(1.0))).state == FINE
    assert border(searched(at(0.005))).state == LOOK


def test_a_mix_better_than_the_baselines_is_fine_and_a_baseline_as_best_is_not():
    found = beats_baselines(searched(BEST))
    assert found.state == FINE and "0.66, against 0.81 of all-int16" in found.text
    alone = beats_baselines(searched())
    assert alone.state == LOOK and "the baseline all-int16" in alone.text
    assert beats_baselines(searched(BEST, baselines={})).state == UNKNOWN
    assert beats_baselines(searched(trial(2, 0.5, 0.6), trials=[INT8])).state == LOOK


def test_a_goal_out_of_reach_says_what_is_in_the_way():
    assert feasible(searched(BEST)).state == FINE
    worse = trial(0, 0.03, 0.81, "all-int16")
    found = feasible(searched(trials=[worse], baselines={"all-int16": worse}))
    assert found.state == LOOK and "All-int16 itself loses 0.03, and 0.01 is allowed" in found.text
    goal = Goal(0.01, max_latency_ms=0.5).aimed("accuracy/found", "maximize", ("accuracy/found", "cost/latency_ms"))
    slow = feasible(searched(trials=[trial(0, 0.001, 0.81, goal=goal)], goal=goal))
    assert slow.state == LOOK and "none stays below max_latency_ms" in slow.text
    assert feasible(searched(trials=[])).state == UNKNOWN


def test_a_parameter_without_influence_is_named():
    shares = {(FANOVA, "drop"): {"a": 0.9, "b": 0.001}, (FANOVA, "ms"): {"a": 0.5, "b": 0.002}}
    found = influence(searched(BEST, importances=Importances(shares)))
    assert found.state == LOOK and found.text.startswith("b explains less than 1%")
    helped = {**shares, (FANOVA, "ms"): {"a": 0.5, "b": 0.5}}
    assert influence(searched(BEST, importances=Importances(helped))).state == FINE
    few = influence(searched(BEST, importances=Importances({}, "20 finished trials are needed")))
    assert few.state == UNKNOWN and "20 finished trials" in few.text


def scores_of(wrong):
    """Scores of 1000 samples of which those in `wrong` are misses."""
    return [0.0 if i in wrong else 1.0 for i in range(1000)]


def test_differences_within_the_noise_are_named_and_how_the_noise_was_found():
    found = resolution(searched(BEST))
    assert found.state == LOOK and "binomial bound" in found.text  # 0.008 from the goal; two errors are 0.026
    float_wrong = set(range(90))
    kept = {None: scores_of(float_wrong), 2: scores_of({*float_wrong, 500, 501}), 1: scores_of(range(130))}
    paired = resolution(searched(BEST, scores=lambda t: kept[t.number if t else None]))
    assert paired.state == FINE and "paired by sample" in paired.text
    assert "the cheaper trial 1, which misses it, loses 0.038 more" in paired.text


def test_a_metric_that_is_no_share_has_unknown_noise_without_scores():
    assert resolution(searched(BEST, float_metric=3.7)).state == UNKNOWN


@pytest.mark.parametrize(
    ("amount", "state", "words"),
    [
        ((16, 256), FINE, "256 samples in 16 steps."),
        ((4, 256), LOOK, "the guide asks for 10 to 100 steps"),
        ((20, 40), LOOK, "fewer than 50 samples"),
        ((0, 0), UNKNOWN, "not recorded"),
    ],
)
def test_too_few_calibration_samples_are_named(amount, state, words):
    found = calibrated(searched(BEST, calibration=amount))
    assert found.state == state and words in found.text


def test_failures_are_counted_with_their_reason():
    assert failures(searched(BEST)).state == FINE
    failed = [FailedTrial(9, "", {}, "", "NaN or inf"), FailedTrial(10, "", {}, "", "out of memory")]
    found = failures(searched(BEST, failed=failed))
    assert found.state == LOOK and found.text == "2 of 5 trials failed: NaN or inf (1 more reasons below)"


def test_every_check_answers_for_a_study_without_trials():
    assert [v.state for v in health(searched(trials=[], baselines={}, calibration=(0, 0)))].count(UNKNOWN) >= 5
    assert all(v.text for v in health(record(24).searched))
