"""Divergence of QAT: seen for losses of any sign and scale, from the first step on, and not in sound trainings."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.training import data, same, sgd, small

from qflow.core.settings import QatSettings
from qflow.quant.train.first_batch import RULE, due, risen, suspicious
from qflow.quant.train.qat import train
from qflow.quant.train.report import DivergedError

FIRST = 3
SETTINGS = QatSettings(steps=12, first_losses=FIRST)


def entropy(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


def similarity(outputs, batch):
    """How differently from the untrained model the outputs differ between the samples: -1 at the start."""
    with torch.no_grad():
        wanted = teacher()(batch[0])
    return -F.cosine_similarity(outputs - outputs.mean(0), wanted - wanted.mean(0)).mean()


@cache
def teacher():
    return small().model


LOSSES = {
    "positive": entropy,
    "below zero": lambda o, b: entropy(o, b) - 50.0,
    "large": lambda o, b: 1e5 * entropy(o, b),
    "small": lambda o, b: 1e-5 * entropy(o, b) - 1e-4,
    "similarity": similarity,
}


def fit(loss, rate, prepared=None, settings=SETTINGS, **more):
    prepared = prepared or small()
    optimizer = torch.optim.AdamW(prepared.parameters(), rate)
    return train(prepared, list(data(4)), loss, optimizer, settings=settings, **more)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rate_that_ruins_the_model_in_its_first_step_ends_the_training(loss):
    with pytest.raises(DivergedError) as caught:
        fit(LOSSES[loss], 3.0)
    assert caught.value.step <= 2 * FIRST
    assert "\n" not in str(caught.value) and str(caught.value).endswith("Lower qat.learning_rate, or see qat_debug.")
    assert caught.value.first_bad_operator


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rate", [1e-5, 1e-3, 1e-2])
def test_a_sound_training_goes_on_whatever_the_sign_and_scale_of_its_loss(loss, rate):
    report = fit(LOSSES[loss], rate)
    assert report.finished and len(report.losses) == SETTINGS.steps


def test_the_first_batch_says_so_where_the_first_losses_are_those_of_a_ruined_model():
    with pytest.raises(DivergedError, match=r"at step 4; the first bad operator is \S+ \(.* times its calibrated"):
        fit(similarity, 3.0)


def test_a_harder_batch_after_an_easy_first_one_is_no_divergence():
    """The losses of all later batches are far above the first one, and nothing is wrong with the model."""
    prepared, batches = small(), [next(data(1))] * 12
    factors = iter([0.01] + [1.0] * 11 + [0.01] * 20)

    def noisy(outputs, batch):
        return next(factors) * entropy(outputs, batch) - 5.0

    assert train(prepared, batches, noisy, sgd(prepared, 1e-6), settings=SETTINGS).finished


def test_judging_the_first_batch_changes_no_training():
    """Each later loss is worse than the first, so the first batch is judged; the result is that without judging."""

    def fitted(loss):
        torch.manual_seed(1)
        prepared = small()
        report = train(prepared, list(data(4)), loss, sgd(prepared, 1e-3), settings=SETTINGS)
        return report.losses, prepared.state_dict()

    seen: list[float] = []

    def rising(outputs, batch):
        if outputs.requires_grad:  # not while it is judged
            seen.append(0.0)
        return entropy(outputs, batch) + 10.0 * len(seen)

    plain, wanted = fitted(entropy)
    losses, state = fitted(rising)
    assert [v - 10.0 * (k + 1) for k, v in enumerate(losses)] == pytest.approx(plain, abs=1e-4)
    assert same(state, wanted)


def test_a_training_that_is_continued_judges_the_same_first_batch(tmp_path):
    place = tmp_path / "training.safetensors"
    stop = QatSettings(steps=12, first_losses=8, checkpoint_every=2)

    def until(step, number):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(similarity, 3.0, settings=stop, checkpoint=place, on_step=until)
    again = [0.0, 0.0]
    for k, resume in enumerate((True, False)):
        with pytest.raises(DivergedError, match="at step 9;") as caught:
            fit(similarity, 3.0, settings=stop, checkpoint=place if resume else None, resume=resume)
        again[k] = str(caught.value)
    assert again[0] == again[1]


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(numbers, min_size=2, max_size=30))
def test_a_first_batch_with_its_first_loss_has_not_risen(losses):
    assert not risen(losses, losses[0], FIRST)
    assert not risen(losses, losses[0] - 1.0, FIRST)


@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=12), st.integers(-10, 10), st.integers(-8, 8))
def test_suspicion_depends_on_neither_scale_nor_level_of_a_loss(losses, level, power):
    changed = [2.0**power * (value + 1024.0 * level) for value in losses]
    assert suspicious(changed, FIRST) == suspicious(losses, FIRST)


@given(st.floats(0.01, 1e3), st.floats(-1e4, 1e4), st.integers(1, 20))
def test_a_rise_beyond_the_noise_counts_at_any_level(noise, level, count):
    later = [level + 100.0 * noise + (k % 3) * noise for k in range(count)]
    assert risen([level, *later], level + 100.0 * noise, FIRST) and suspicious([level, *later], FIRST)
    assert risen([level, *later], math.nan, FIRST)


def test_the_first_batch_is_judged_ever_more_rarely_and_at_the_end():
    settings = QatSettings(steps=40, first_losses=5)
    assert [step for step in range(1, 41) if due(step, settings)] == [6, 11, 21, 40]
    assert RULE.startswith("A loss does not rise")
