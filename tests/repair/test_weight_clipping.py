"""Clipping of int8 weights: a smaller scale where a large weight meets small inputs, and nowhere else."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rounding import SETTINGS, all_at, calibrated, error, quantized_weights, recalibrate
from support.zoo import build
from torch import nn

from qflow.core.dtype import QDtype
from qflow.quant.model.prepare import prepare
from qflow.repair.base.contract import Context, Point
from qflow.repair.base.operators import leaves
from qflow.repair.run import repair
from qflow.repair.weights.bias import FloatOutputs
from qflow.repair.weights.rounding import round_weights, write
from qflow.repair.weights.weight_clipping import WeightClipping, clipped_weights
from qflow.repair.weights.weight_steps import Reference

QUIET = 1  # the input channel that is nearly always 0
LOUD_WEIGHT = 50.0  # times the usual size of a weight
KINDS = {
    "conv": nn.Conv2d(4, 6, 3, bias=False),
    "strided": nn.Conv2d(4, 6, 3, stride=2, dilation=2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3, stride=2),
    "transposed and grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "linear": nn.Linear(4, 6),
}


def quiet_channel(layer, norm=True):
    """`layer` with a batch norm, weights of the usual size, and large ones where its input is nearly 0."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer)
    linear = isinstance(layer, nn.Linear)
    nn.init.normal_(layer.weight, std=0.1)
    with torch.no_grad():
        if isinstance(layer, nn.ConvTranspose2d) or layer.weight.shape[1] == 1:
            layer.weight[QUIET, ..., 0, 0] = 0.1 * LOUD_WEIGHT
        elif layer.weight.shape[1] == 2:  # two groups: QUIET is the second input of the first
            layer.weight[:3, QUIET, 0, 0] = 0.1 * LOUD_WEIGHT
        else:
            layer.weight[:, QUIET].view(6, -1)[:, 0] = 0.1 * LOUD_WEIGHT
    channels = getattr(layer, "out_channels", 6)
    bn = (nn.BatchNorm1d if linear else nn.BatchNorm2d)(channels)
    with torch.no_grad():
        bn.weight.uniform_(-2, 2)
        bn.running_var.uniform_(0.5, 2)
    x = torch.rand(32, 4) if linear else torch.rand(32, 4, 7, 7)
    x[:, QUIET] *= 1e-3
    return nn.Sequential(layer, bn, nn.ReLU()).eval() if norm else nn.Sequential(layer, nn.ReLU()).eval(), x


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "depthwise"])
def test_a_large_weight_for_small_inputs_is_clipped_and_the_output_is_better(kind):
    model, x = quiet_channel(KINDS[kind])
    fit, held = x[:24], x[24:]
    prepared = calibrated(model, [fit])
    before = error(prepared, model, held)
    found = clipped_weights(prepared, [fit])
    assert set(found) == {"0"} and found["0"].after < found["0"].before / 2
    write(prepared, "0", leaves(prepared)["0"], found["0"].weight)
    recalibrate(prepared, [fit])
    assert error(prepared, model, held) < 0.7 * before
    moved = (prepared.model[0].weight != model[0].weight).nonzero()
    axis = 0 if kind.startswith("transposed") else 1
    assert set(moved[:, axis].tolist()) <= ({QUIET} if kind != "grouped" else {0, QUIET})


def test_where_every_weight_of_a_channel_meets_the_same_inputs_nothing_is_clipped():
    """A depthwise channel with one large weight: its output is mostly that weight's."""
    model, x = quiet_channel(KINDS["depthwise"])
    assert clipped_weights(calibrated(model, [x]), [x]) == {}


@pytest.mark.parametrize("kind", ["conv", "transposed", "linear"])
def test_the_scale_follows_from_the_clipped_weight_in_any_calibration(kind):
    """The folded weight has the threshold as its largest value, whatever sign and size the batch norm's factor has."""
    model, x = quiet_channel(KINDS[kind])
    prepared = calibrated(model, [x])
    old = prepared.weights["0"].scale.clone()
    found = clipped_weights(prepared, [x])["0"]
    leaf = leaves(prepared)["0"]
    write(prepared, "0", leaf, found.weight)
    recalibrate(prepared, [x])
    share = prepared.weights["0"].scale / old
    assert float(share.min()) == pytest.approx(found.lowest, rel=1e-5)
    assert int((share < 0.999).sum()) == found.channels
    (quantized,) = quantized_weights(prepared, ["0"], x).values()
    m = torch.ones_like(quantized)
    m.select(0 if kind == "transposed" else 1, QUIET).mul_(1e-6)
    wanted = calibrated(model, [x])
    (plain,) = quantized_weights(wanted, ["0"], x).values()
    right = leaves(wanted)["0"].folded()[0].detach()
    assert float(((quantized - right).square() * m).sum()) < float(((plain - right).square() * m).sum()) / 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 6, 8]), st.booleans())
def test_the_error_that_it_measures_never_grows(seed, bits, heavy):
    torch.manual_seed(seed)
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 12) ** (5 if heavy else 1))
    x = torch.randn(16, 12) * torch.rand(12) ** 4
    prepared = calibrated(nn.Sequential(layer, nn.ReLU()).eval(), [x])
    for clipped in clipped_weights(prepared, [x], bits).values():
        assert clipped.after < 0.9 * clipped.before
        assert bool((clipped.weight.abs() <= layer.weight.abs()).all())
        assert bool((clipped.weight * layer.weight >= 0).all())


def test_one_scale_for_the_whole_weight_is_one_channel_and_int16_weights_are_left_alone():
    model, x = quiet_channel(KINDS["conv"], norm=False)
    prepared = prepare(model, x)
    context = Context([(x, len(x))], all_at(prepared), SETTINGS)
    ops = context.qconfig.ops
    context.qconfig = context.qconfig.with_ops({n: replace(op, weight_axis=-1) for n, op in ops.items() if op.weight})
    context.calibrate(prepared)
    found = clipped_weights(prepared, [x])["0"]
    assert (found.channels, found.total) == (1, 1) and str(found).startswith("the weight clipped to 0.")
    wide = {n: replace(op, weight=QDtype.qint16) for n, op in ops.items() if op.weight}
    context.qconfig = context.qconfig.with_ops(wide)
    context.calibrate(prepared)
    assert clipped_weights(prepared, [x]) == {}


def test_as_a_step_it_is_kept_where_held_out_samples_say_so_and_rounding_keeps_its_scale():
    model, x = quiet_channel(KINDS["conv"])
    prepared = prepare(model, x[:2])
    step = WeightClipping(Reference(FloatOutputs))
    found, context, table = repair(prepared, [(x, 32)], all_at(prepared), SETTINGS, [step])
    assert [(row.step, row.parts, row.verdict) for row in table.rows] == [("weight_clipping", ("0",), "kept")]
    assert table.after < 0.7 * table.before and "6 of 6 channels clipped" in table.rows[0].changed["0"]
    scale = found.weights["0"].scale.clone()
    round_weights(found, [x])
    context.calibrate(found)
    assert torch.equal(found.weights["0"].scale, scale)


def test_undo_takes_it_back_and_what_has_nothing_to_gain_is_named():
    model, x = quiet_channel(KINDS["conv"])
    model.append(nn.Conv2d(6, 2, 1)).eval()
    prepared = prepare(model, x[:2])
    context = Context([(x, 32)], all_at(prepared), SETTINGS)
    context.calibrate(prepared)
    step, before = WeightClipping(Reference(FloatOutputs)), Point.of(prepared, context)
    parts, refused = step.parts(prepared, context)
    assert [part.name for part in parts] == ["0"]
    assert refused == {"3": "no smaller scale takes 20% off its error"}
    step.apply(prepared, context, parts)
    assert not torch.equal(prepared.model[0].weight, before.weights["0.weight"])
    step.undo(prepared, context, before)
    assert torch.equal(prepared.model[0].weight, before.weights["0.weight"])


@pytest.mark.parametrize("name", ["mobilenet", "convnext", "detr", "functional", "two_inputs"])
def test_networks_of_every_kind_pass_through_it(name):
    model, example = build(name)
    prepared = calibrated(model, [example])
    found = clipped_weights(prepared, [example])
    assert all(torch.isfinite(clipped.weight).all() for clipped in found.values())
    assert found == {} or all(clipped.after < clipped.before for clipped in found.values())
