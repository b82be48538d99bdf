"""Rounding and bias correction as steps: they are kept where held-out samples say so, and undone elsewhere."""

import copy

import pytest
import torch
from support.rounding import SETTINGS, all_at, calibrated, error
from support.zoo import build
from torch import nn

from qflow.quant.model.prepare import prepare
from qflow.repair.base.contract import KEPT, REFUSED, UNDONE, Context, Part, Point
from qflow.repair.run import repair
from qflow.repair.weights.bias import FloatOutputs, FloatWeights, correct_biases
from qflow.repair.weights.rounding import round_weights, writable
from qflow.repair.weights.weight_steps import Bias, Reference, Rounding
from qflow.tasks.digits import build_data, build_model


@pytest.fixture(scope="module")
def digits():
    data = build_data()
    return (
        build_model(),
        [data.calibration.tensors[0][i : i + 32] for i in range(0, 128, 32)],
        data.evaluation.tensors[0],
    )


def repaired(model, batches, kind=FloatOutputs, steps=(Rounding, Bias)):
    prepared, reference = prepare(model, batches[0]), Reference(kind)
    sized = [(batch, len(batch)) for batch in batches]
    return prepared, repair(prepared, sized, all_at(prepared), SETTINGS, [step(reference) for step in steps])


@pytest.mark.parametrize("kind", [FloatOutputs, FloatWeights])
def test_both_steps_help_one_after_the_other(digits, kind):
    model, batches, held = digits
    before = copy.deepcopy(model.state_dict())
    prepared, (found, context, table) = repaired(model, batches, kind)
    assert [(row.step, row.verdict) for row in table.rows] == [("rounding", KEPT), ("bias", KEPT)]
    assert table.after < 0.85 * table.before
    assert "of the codes moved" in table.rows[0].changed["conv2"]
    assert "channels shifted" in table.rows[1].changed["conv2"]
    for own in (model, prepared.model):
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    context.calibrate(prepared)
    assert error(found, model, held) < 0.85 * error(prepared, model, held)


def test_it_costs_few_passes(digits):
    """Rounding: a float pass, and one for its moments; bias: the quantized one. Calibrating and judging come on top."""
    _, (_, context, table) = repaired(*digits[:2])
    rounding, bias = (row.forwards for row in table.rows)
    judged = context.forwards - table.forwards + 96 + table.held_out
    assert rounding == 2 * 96 + judged
    assert bias == 96 + judged


def test_the_reference_is_the_float_model_before_the_first_step(digits):
    """After rounding the prepared model is another float model; bias correction goes by the first one."""
    model, batches, _ = digits
    prepared = prepare(model, batches[0])
    context = Context([(batch, len(batch)) for batch in batches], all_at(prepared), SETTINGS)
    context.calibrate(prepared)
    reference = Reference(FloatOutputs)
    rounding = Rounding(reference)
    rounding.apply(prepared, context, rounding.parts(prepared, context)[0])
    kept = reference.take(prepared, context)
    assert isinstance(kept, FloatOutputs)
    of_float, of_rounded = (FloatOutputs.of(m, batches) for m in (prepare(model, batches[0]), prepared))
    assert torch.equal(kept.means[0]["conv2"][0], of_float.means[0]["conv2"][0])
    assert not torch.equal(kept.means[0]["conv2"][0], of_rounded.means[0]["conv2"][0])


def test_a_part_alone_changes_only_itself_and_undo_takes_it_back(digits):
    model, batches, _ = digits
    prepared = prepare(model, batches[0])
    context = Context([(batch, len(batch)) for batch in batches], all_at(prepared), SETTINGS)
    context.calibrate(prepared)
    reference = Reference(FloatOutputs)
    for step, changed in ((Rounding(reference), "conv2.weight"), (Bias(reference), "norm2.bias")):
        before = Point.of(prepared, context)
        parts, refused = step.parts(prepared, context)
        assert ([part.name for part in parts], refused) == (["conv1", "conv2", "conv3", "dense"], {})
        assert set(step.apply(prepared, context, [Part("conv2")])) == {"conv2"}
        after = Point.of(prepared, context).weights
        assert {name for name in after if not torch.equal(after[name], before.weights[name])} == {changed}
        step.undo(prepared, context, before)
        assert all(
            torch.equal(value, before.weights[name]) for name, value in Point.of(prepared, context).weights.items()
        )


def test_what_does_not_help_is_undone_and_what_cannot_be_corrected_is_named():
    """Samples of another kind than the held-out ones: a correction that fits them does harm there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()).eval()
    fit, held = torch.rand(24, 2, 6, 6) * 0.1 + 1.0, -torch.rand(8, 2, 6, 6)
    _, (found, _, table) = repaired(model, [torch.cat([fit, held])])
    assert found.weights.keys() == {"0", "2"}
    assert any(row.verdict == UNDONE for row in table.rows)
    assert table.after <= table.before
    refused = [row for row in table.rows if row.verdict == REFUSED and row.parts == ("0",)]
    assert "adds no parameter" in refused[0].reason


@pytest.mark.parametrize("name", ["mobilenet", "squeeze_excite", "convnext", "detr", "bev", "functional", "two_inputs"])
def test_networks_of_every_kind_take_both_steps_and_keep_their_architecture(name):
    model, example = build(name)
    prepared = calibrated(model, [example])
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    target = FloatOutputs.of(prepared, [example])
    rounded = round_weights(prepared, [example])
    assert rounded.keys() | writable(prepared)[1].keys() == prepared.weights.keys()
    correct_biases(prepared, [example], target)
    state = prepared.model.state_dict()
    assert {key: value.shape for key, value in state.items()} == shapes
    assert all(torch.isfinite(value).all() for value in state.values())
