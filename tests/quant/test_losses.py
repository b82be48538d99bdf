"""The user's loss in QAT: its form, its divergence, and what there is to train with it."""

import pytest
import torch
import torch.nn.functional as F
from support.training import data, loss, sgd, small

from qflow.core.errors import ConfigError
from qflow.core.settings import QatSettings
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.loss import runaway
from qflow.quant.train.qat import train
from qflow.quant.train.report import DivergedError


def test_a_loss_below_zero_diverges_when_it_has_lost_most_of_itself():
    settings = QatSettings(first_losses=3, divergence=10)
    first = [-0.99, -0.98, -0.97]
    assert runaway(first, 5.0, settings) == ""  # one value among three
    rule = "A loss below zero stays below 1/10 of its first values (about -0.98)"
    assert runaway([*first, 0.1, 0.2], 0.3, settings) == rule
    assert runaway([*first, -0.5, -0.4], -0.3, settings) == ""
    assert runaway([-0.05, 0.4, -0.3, 0.3, 0.2], 0.1, settings) == ""  # noise around zero
    assert runaway([-200.0, -190.0, -195.0, -5.0, 3.0], -8.0, settings)  # a log-likelihood
    assert runaway([0.0, 0.0, 0.0, 1.0, 1.0], 1.0, settings) == ""  # nothing to measure against


def test_a_similarity_that_is_trained_away_stops_the_training():
    prepared = small()
    inputs = next(data(1))
    with torch.no_grad(), prepared.quantized():
        target = prepared(inputs[0])

    def similarity(outputs, batch):
        return -F.cosine_similarity(outputs, target).mean()

    def batches():
        for step in range(20):
            with torch.no_grad():
                prepared.model.head.weight.mul_(-1.0 if step == 4 else 1.0)
                prepared.model.head.bias.mul_(-1.0 if step == 4 else 1.0)
            yield inputs

    settings = QatSettings(steps=20, first_losses=2)
    with pytest.raises(DivergedError, match=r"A loss below zero stays below 1/10 .* at step [56];"):
        train(prepared, batches(), similarity, sgd(prepared, 1e-6), settings=settings)


def test_a_loss_that_is_no_number_at_the_first_step_blames_the_loss():
    prepared = small()
    with pytest.raises(DivergedError, match=r"got nan at step 1; .*\. See what qat\.loss returns"):
        train(prepared, data(), lambda o, b: loss(o, b) * float("nan"), sgd(prepared), settings=QatSettings(steps=3))


LOSSES = {
    "dict": (lambda o, b: {"loss": loss(o, b), "aux": loss(o, b)}, "got a dict of loss, aux. Return their sum."),
    "vector": (lambda o, b: o.square().mean(1), r"got \(8,\). Return its mean."),
    "list": (lambda o, b: [loss(o, b)], "got list. Return its mean."),
    "error": (lambda o, b: b["nothing"], r"qat.loss must take \(outputs, batch\), but got TypeError: "),
    "constant": (lambda o, b: torch.tensor(1.0), "depends on none"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_a_loss_of_another_form_is_refused_in_one_line(case):
    prepared, (bad, says) = small(), LOSSES[case]
    with pytest.raises(ConfigError, match=says) as caught:
        train(prepared, data(), bad, sgd(prepared), settings=QatSettings(steps=3))
    assert "\n" not in str(caught.value)


def test_a_model_without_a_trainable_parameter_is_refused():
    prepared = small()
    names = tuple(dict.fromkeys(n.split(".")[0] for n, _ in prepared.model.named_parameters()))
    settings = QatSettings(steps=3, freeze=names)
    with pytest.raises(ConfigError, match=r"qat\.freeze=\[stem,blocks,.*head\], which covers them all. Leave one out"):
        train(prepared, data(), loss, sgd(prepared), settings=settings)
    assert all(p.requires_grad for p in prepared.model.head.parameters())
    prepared.requires_grad_(False)
    with pytest.raises(ConfigError, match="a model in which all are frozen. Set requires_grad on some"):
        parameter_groups(prepared, {}, 0.1)
