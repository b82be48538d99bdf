"""The float model as teacher, averaged weights, and the dampening of oscillations."""

import copy

import pytest
import torch
from support.training import data, loss, same, sgd, small
from torch import nn

from qflow.core.errors import ConfigError
from qflow.core.settings import QatSettings, TeacherSettings
from qflow.quant.train.averaged import Averaged
from qflow.quant.train.qat import train
from qflow.quant.train.teacher import Teacher


def taught(prepared, steps=12, own=None, rate=0.02, **changes):
    teacher = {"weight": 1.0, **changes.pop("teacher", {})}
    settings = QatSettings(steps=steps, moving=False, teacher=teacher, **changes)
    return train(prepared, list(data()), own, sgd(prepared, rate), None, settings)


def test_the_float_model_alone_teaches_without_labels():
    prepared = small()
    images = torch.cat([x for x, _ in data()])
    with torch.no_grad():
        reference = prepared(images)

    def far():
        with torch.no_grad(), prepared.quantized():
            return float((prepared(images) - reference).square().sum() / reference.square().sum())

    with torch.no_grad():
        for parameter in prepared.model.parameters():
            parameter.mul_(1.05)  # so that there is something to give back
    prepared.follow_weights()
    float_model, before = small().model, far()
    settings = QatSettings(steps=24, moving=False, teacher={"weight": 1.0})
    batches = [(x, None) for x, _ in data()]
    report = train(prepared, batches, None, sgd(prepared, 0.01), None, settings, float_model=float_model)
    assert far() < 0.5 * before
    assert report.losses[0] == pytest.approx(float(report.losses[0])) and report.losses[-1] < report.losses[0]
    assert not float_model.training and all(p.grad is None for p in float_model.parameters())


def test_beside_a_loss_it_adds_its_weight_and_features_add_theirs():
    both = taught(small(), 1, loss).losses[0]
    alone, task = taught(small(), 1).losses[0], train(small(), data(), loss, sgd(small()), None,
                                                      QatSettings(steps=1, moving=False)).losses[0]  # fmt: skip
    assert both == pytest.approx(task + alone)
    assert taught(small(), 1, teacher={"weight": 3.0}).losses[0] == pytest.approx(3 * alone)
    assert taught(small(), 1, teacher={"features": ["blocks.0", "blocks.1"]}).losses[0] > alone


REFUSED = {
    "no module": ({"features": ["blok.0"]}, r"qat.teacher.features names modules, but got 'blok.0'"),
    "a folded norm": ({"features": ["stem.0"]}, r"got stem.0, into which stem.1 is folded. Name stem.1 instead."),
    "no weight": ({"weight": 0.0, "features": ["stem.1"]}, "Set qat.teacher.weight=1."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_with_a_way_out(case):
    changes, says = REFUSED[case]
    with pytest.raises(ConfigError, match=says):
        taught(small(), 1, teacher=changes)
    with pytest.raises(ConfigError, match="QAT needs a loss, but got none"):
        train(small(), data(), None, sgd(small()), None, QatSettings(steps=1))


class Heads(nn.Module):
    """Gives more outputs in train mode, and a mask of -inf."""

    def __init__(self):
        super().__init__()
        self.body, self.side = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        out = {"main": [self.body(x), (x > 0)], "mask": torch.full((2, 2), float("-inf"))}
        return {**out, "side": self.side(x)} if self.training else out


def test_outputs_of_any_structure_are_compared_where_they_have_a_counterpart():
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(5, 4)
    teacher = Teacher(copy.deepcopy(model), TeacherSettings(weight=1.0))
    answers = teacher.answers(x)
    assert teacher.loss(model.eval()(x), {}, answers).item() == 0.0 and not teacher.findings
    assert teacher.loss(model.train()(x), {}, answers).item() == 0.0
    assert "no counterpart of the same shape for 1 outputs, side first" in teacher.findings[0]
    with torch.no_grad():
        model.body.weight.mul_(2), model.body.bias.mul_(2)
    own = teacher.loss(model.eval()(x), {}, answers)
    assert own.item() == pytest.approx(0.5)  # twice the values: an error of 1, and the mask's is 0
    own.backward()
    with pytest.raises(ConfigError, match="outputs of the same names and shapes in train and eval mode, but got none"):
        teacher.loss({"other": x}, {}, answers)


def test_logits_are_compared_at_a_temperature():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    teacher = Teacher(nn.Identity(), TeacherSettings(weight=1.0, temperature=2.0))
    answers = teacher.answers(logits)
    assert float(teacher.loss(logits + 3.0, {}, answers)) == pytest.approx(0.0, abs=1e-5)  # a shift of all logits
    assert float(teacher.loss(logits * 2.0, {}, answers)) > 0.01
    with pytest.raises(ConfigError, match=r"logits of \(batch, classes\), but got \(2, 3, 4\)"):
        teacher.loss(torch.ones(2, 3, 4), {}, teacher.answers(torch.ones(2, 3, 4)))


def test_averaged_weights_are_stored_and_a_resumed_training_gives_the_same(tmp_path):
    place, batches = tmp_path / "c.safetensors", list(data())
    settings = QatSettings(steps=6, ema=0.5)
    last, whole, again = small(), small(), small()
    train(last, batches, loss, sgd(last), None, QatSettings(steps=6))
    train(whole, batches, loss, sgd(whole), None, settings)
    first = small()
    train(first, batches, loss, sgd(first), None, QatSettings(steps=3, ema=0.5), checkpoint=place)
    train(again, batches, loss, sgd(again), None, settings, checkpoint=place, resume=True)
    assert same(whole.state_dict(), again.state_dict())
    start = small().model.state_dict()["head.weight"]
    moved, averaged = (m.model.state_dict()["head.weight"] - start for m in (last, whole))
    assert 0 < float(averaged.norm()) < float(moved.norm())
    for path, quantizer in whole.weights.items():  # scales are those of the averaged weights
        assert torch.equal(quantizer.scale, quantizer.measured(whole.model.get_submodule(path).folded()[0]))


def test_the_average_follows_its_formula():
    layer = nn.Linear(2, 1)
    averaged, expected = Averaged(layer, 0.3), layer.weight.detach().clone()
    for step in range(4):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        averaged.update()
        expected = expected + (1 - min(0.3, (1 + step) / (10 + step))) * (step - expected)
    averaged.put()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_dampening_pulls_weights_to_the_centres_of_their_codes():
    def off_centre(prepared):
        leaf, quantizer = prepared.model.head, prepared.weights["head"]
        codes = leaf.weight.detach() / quantizer.scale
        return float((codes - codes.round()).square().mean())

    free, damped = small(), small()
    for prepared, weight in ((free, 0.0), (damped, 300.0)):
        settings = QatSettings(steps=20, moving_weights=False, dampening=weight)
        train(prepared, list(data()), loss, sgd(prepared, 1e-3), None, settings)
    assert off_centre(damped) < 0.5 * off_centre(free)
