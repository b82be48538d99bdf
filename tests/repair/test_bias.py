"""Bias correction: the mean of each operator's output is that of the float model."""

import copy

import pytest
import torch
from support.models import zoo
from support.rounding import calibrated, error, recalibrate
from torch import nn

from qflow.repair.base.operators import channel_means, leaves, visiting
from qflow.repair.weights.bias import FloatOutputs, FloatWeights, correct_biases, correctable
from qflow.tasks.digits import build_data, build_model
from qflow.tasks.exposure import ExposureNet


@pytest.fixture(scope="module")
def digits():
    data = build_data()
    return build_model(), [data.calibration.tensors[0][i : i + 32] for i in (0, 32, 64)], data.evaluation.tensors[0]


def outputs(prepared, batch):
    """Mean output of each weighted operator in the quantized model, its batch norm folded in."""
    found, chosen = {}, leaves(prepared)

    def visit(name, run, weight, bias, input):
        result = run(weight, bias, input)
        found[name] = channel_means(chosen[name], result).mean(0)
        return result

    with torch.no_grad(), visiting(chosen, visit), prepared.quantized():
        prepared(batch)
    return found


def gaps(prepared, target, batch):
    found = outputs(prepared, batch)
    return {name: float((value - target.means[0][name][0].mean(0)).norm()) for name, value in found.items()}


def test_it_lowers_the_error_on_other_samples(digits):
    model, fit, held = digits
    prepared = calibrated(model, fit)
    before = error(prepared, model, held)
    target = FloatOutputs.of(prepared, fit)
    assert set(correct_biases(prepared, fit, target)) <= {"conv1", "conv2", "conv3", "dense"}
    recalibrate(prepared, fit)
    assert error(prepared, model, held) < 0.9 * before


def test_the_analytic_correction_needs_no_float_pass_and_helps_too(digits):
    model, fit, held = digits
    prepared = calibrated(model, fit)
    before = error(prepared, model, held)
    correct_biases(prepared, fit, FloatWeights.of(prepared, fit))
    assert error(prepared, model, held) < 0.97 * before


@pytest.mark.parametrize("kind", ["resnet", "unet"])
def test_the_mean_of_every_output_is_that_of_the_float_model(kind):
    model, example = zoo()[kind]
    x = torch.cat([example, example.flip(0) * 0.9, example.flip(3)])
    prepared = calibrated(model, [x])
    target = FloatOutputs.of(prepared, [x])
    before = gaps(prepared, target, x)
    shifts = correct_biases(prepared, [x], target)
    after = gaps(prepared, target, x)
    moved = [name for name in shifts if before[name] > 1e-3]
    assert moved
    assert all(after[name] < 0.7 * before[name] for name in moved), {n: (before[n], after[n]) for n in moved}


def test_a_later_operator_sees_the_earlier_corrections():
    """The second layer is exact, so all of its shift comes from the first: corrected there, nothing is left here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)).eval()
    with torch.no_grad():
        model[1].weight.copy_(-torch.eye(6))  # -1 is a code, 1 is not
    x = torch.rand(64, 4) * 0.05 + 1.0  # nearly constant: the error of the weights is nearly a shift
    prepared = calibrated(model, [x])
    for quantizer in prepared.outputs.values():
        quantizer.dtype = None
    target = FloatOutputs.of(prepared, [x])
    alone = correct_biases(copy.deepcopy(prepared), [x], target, ["1"])
    together = correct_biases(prepared, [x], target)
    assert alone["1"].norm() > 10 * together.get("1", torch.zeros(6)).norm()
    torch.testing.assert_close(together["0"], -alone["1"], rtol=0.05, atol=1e-4)


def test_the_analytic_shift_is_the_error_of_the_weight_times_the_mean_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).eval()
    x = torch.rand(64, 4) * 0.05 + 1.0
    prepared = calibrated(model, [x])
    for quantizer in prepared.outputs.values():
        quantizer.dtype = None
    with prepared.quantized(), torch.no_grad():
        lost = model[0].weight - prepared.weights["0"](model[0].weight)
    found = correct_biases(prepared, [x[:40], x[40:]], FloatWeights.of(prepared, []))["0"]
    torch.testing.assert_close(found, lost.detach() @ x.mean(0), rtol=0.02, atol=1e-5)
    torch.testing.assert_close(prepared.model[0].bias - model[0].bias, found)


@torch.no_grad()
def test_a_shift_that_the_samples_do_not_tell_from_zero_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU()).eval()
    half = torch.randn(32, 4)
    x = torch.cat([half, -half])  # the mean input is zero, so is that of every error
    prepared = calibrated(model, [x])
    shifts = correct_biases(prepared, [x], FloatOutputs.of(prepared, [x])).get("0", torch.zeros(64))
    assert (shifts == 0).float().mean() > 0.9
    assert correct_biases(prepared, [x[:1]], FloatOutputs.of(prepared, [x[:1]])) == {}, "one sample has no spread"


def test_it_goes_to_the_bias_of_the_batch_norm_or_to_the_operators_own(digits):
    prepared = calibrated(digits[0], digits[1])
    start = copy.deepcopy(prepared.model.state_dict())
    correct_biases(prepared, digits[1], FloatOutputs.of(prepared, digits[1]))
    changed = {name for name, value in prepared.model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"norm1.bias", "norm2.bias", "norm3.bias", "dense.bias"}


def test_before_a_norm_without_affine_the_bias_takes_the_shift_over_the_factor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, affine=False), nn.ReLU()).eval()
    model[1].running_var.copy_(torch.tensor([0.01, 1.0, 9.0]))
    x = torch.rand(16, 2, 6, 6) + 1
    prepared = calibrated(model, [x])
    target = FloatOutputs.of(prepared, [x])
    found = correct_biases(prepared, [x], target)["0"]
    expected = found * model[1].running_var.sqrt()
    torch.testing.assert_close(prepared.model[0].bias - model[0].bias, expected, rtol=1e-3, atol=1e-6)


def test_an_operator_without_a_bias_is_named_and_gets_none():
    model = ExposureNet().eval()
    prepared = calibrated(model, [torch.rand(8, 1, 8, 8)])
    chosen, skipped = correctable(prepared)
    assert skipped == {"conv1": "neither it nor a batch norm after it has a bias, and a repair adds no parameter"}
    assert "conv1" not in chosen


@pytest.mark.parametrize("kind", ["shared", "attention", "two_inputs"])
def test_models_of_every_kind_keep_their_architecture(kind):
    model, example = zoo()[kind]
    prepared = calibrated(model, [example])
    before = {name: value.shape for name, value in prepared.model.state_dict().items()}
    correct_biases(prepared, [example], FloatOutputs.of(prepared, [example]))
    assert {name: value.shape for name, value in prepared.model.state_dict().items()} == before
    assert all(torch.isfinite(value).all() for value in prepared.model.state_dict().values())
