"""Learned step sizes: int8 activation scales that are trained beside the weights."""

import copy
import dataclasses
import math

import pytest
import torch
from support.models import ResNet, revive
from support.training import calibrated, data, loss, same, small

from qflow.core.dtype import QDtype
from qflow.core.settings import QatSettings
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.learned_scales import GROUP, LearnedScales
from qflow.quant.train.qat import train
from qflow.quant.values.grid import straight_through


def trained(prepared, steps=6, make=torch.optim.AdamW, qconfig=None, batches=None, checkpoint=None, **changes):
    settings = QatSettings(steps=steps, learning_rate=1e-3, learned_scales=10.0, **changes)
    learned = LearnedScales.of(prepared, settings, qconfig)
    groups = parameter_groups(prepared, settings.rates, settings.learning_rate, 0.1, learned)
    optimizer = make(groups, lr=settings.learning_rate)
    report = train(
        prepared, batches or list(data()), loss, optimizer, None, settings,
        qconfig=qconfig, learned=learned, checkpoint=checkpoint, resume=checkpoint is not None,
    )  # fmt: skip
    return learned, optimizer, report


def numbers(prepared):
    return {name: float(quantizer.scale) for name, quantizer in prepared.outputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_a_scale_is_that_of_lsq(dtype):
    torch.manual_seed(0)
    x = (torch.randn(4, 50) * 3).to(dtype).requires_grad_()
    scale, weight = torch.tensor(0.03, requires_grad=True), torch.randn(4, 50, dtype=dtype)
    (straight_through(x, scale, -128, 127) * weight).sum().backward()
    ratio = x.detach() / scale.detach()
    inside = (ratio.round() >= -128) & (ratio.round() <= 127)
    step = torch.where(inside, ratio.round() - ratio, ratio.clamp(-128, 127))
    expected = (step * weight).sum() / math.sqrt(x.numel() * 127)
    assert bool((~inside).any())
    torch.testing.assert_close(scale.grad, expected.float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(x.grad, torch.where(inside, weight, torch.zeros_like(weight)))


def test_an_operator_in_place_may_write_into_what_was_quantized():
    x, scale = torch.linspace(-2.0, 2.0, 9, requires_grad=True), torch.tensor(0.03, requires_grad=True)
    straight_through(x, scale, -128, 127).relu_().sum().backward()
    assert torch.equal(x.grad, (x.detach() > 0).float()) and scale.grad.item() != 0.0


def test_int8_scales_are_trained_and_all_others_stay_as_calibrated():
    prepared, qconfig = calibrated(revive(ResNet()), torch.randn(4, 3, 16, 16))
    names = [n.name for n in prepared.graph.quantized if prepared.outputs[n.quantizer].dtype == QDtype.qint8]
    ops = dict(qconfig.ops)
    ops[names[0]] = dataclasses.replace(ops[names[0]], frozen=True)
    ops[names[1]] = dataclasses.replace(ops[names[1]], fixed_scale=0.5)
    before = numbers(prepared)
    trained(prepared, qconfig=dataclasses.replace(qconfig, ops=ops), freeze=("blocks.1",))
    kept = {n.quantizer for n in prepared.graph.quantized if n.name in names[:2] or n.name.startswith("blocks.1")}
    after = numbers(prepared)
    assert all(after[name] == before[name] for name in kept)
    free = [n for n, q in prepared.outputs.items() if q.dtype == QDtype.qint8 and n not in kept]
    assert free and all(after[name] != before[name] and after[name] > 0 for name in free)
    assert all(abs(math.log(after[name] / before[name])) < 6 * 0.0101 for name in free)  # Adam: 1 % in a step
    wide = small(QDtype.qint16)
    before = numbers(wide)
    learned, _, _ = trained(wide)
    assert all(numbers(wide)[n] == s for n, s in before.items() if wide.outputs[n].dtype == QDtype.qint16)
    assert learned is None or all(q.dtype == QDtype.qint8 for q in learned.quantizers)


def test_their_group_has_no_weight_decay_and_a_rate_relative_to_that_of_the_weights():
    prepared = small()
    before = numbers(prepared)
    _, optimizer, _ = trained(prepared, make=torch.optim.SGD)
    *weights, scales = optimizer.param_groups
    assert (scales["name"], scales["weight_decay"], scales["lr"]) == (GROUP, 0.0, pytest.approx(0.01))
    assert all(group["weight_decay"] == 0.1 and group["lr"] == 1e-3 for group in weights)
    still = small()
    settings = QatSettings(steps=2, learning_rate=0.0, learned_scales=10.0)
    learned = LearnedScales.of(still, settings)
    optimizer = torch.optim.AdamW(parameter_groups(still, {}, 0.0, 0.0, learned), lr=0.0)
    train(still, data(), loss, optimizer, None, settings, learned=learned)
    assert numbers(still) == before  # a rate of 0 keeps them bit for bit


def test_a_resumed_training_and_a_loaded_state_are_the_same_bit_for_bit(tmp_path):
    whole, parts, loaded = small(), small(), small()
    batches = list(data())
    _, _, report = trained(whole, 6, batches=batches, ema=0.9)
    trained(parts, 3, batches=batches, ema=0.9, checkpoint=tmp_path / "c.safetensors")
    again = small()
    _, _, resumed = trained(again, 6, batches=batches, ema=0.9, checkpoint=tmp_path / "c.safetensors")
    assert resumed.losses == report.losses
    assert same(whole.state_dict(), again.state_dict())
    assert whole.state_dict().keys() == small().state_dict().keys()
    loaded.load_state_dict(whole.state_dict())
    images = batches[0][0]
    with torch.no_grad(), whole.quantized(), loaded.quantized():
        assert torch.equal(whole(images), loaded(images))
        assert torch.equal(copy.deepcopy(whole)(images), loaded(images))
