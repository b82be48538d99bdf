"""Rounding by reconstruction: the codes of int8 weights that keep the outputs of a calibrated model."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.models import zoo
from support.rounding import calibrated, error, quantized_weights, recalibrate
from support.zoo import MobileNet
from torch import nn
from torch.nn.utils import parametrize

from qflow.core.dtype import QDtype
from qflow.core.settings import CalibrationSettings
from qflow.repair.weights import rounding
from qflow.repair.weights.rounding import grid_of, round_weights, writable
from qflow.tasks.digits import build_data, build_model

BITS = 6  # at 8 bits the inputs of so small a network lose more than its weights


@pytest.fixture(scope="module")
def digits():
    data = build_data()
    return build_model(), [data.calibration.tensors[0][i : i + 32] for i in (0, 32, 64)], data.evaluation.tensors[0]


def nearest(prepared):
    """The same model with the nearest codes of fewer bits."""
    for name, leaf in writable(prepared)[0].items():
        grid = grid_of(leaf, prepared.weights[name], BITS)
        rounding.write(prepared, name, leaf, rounding.stored(leaf, grid, grid.nearest(grid.weight)))


def test_new_codes_lower_the_error_on_samples_that_chose_none_of_them(digits):
    model, fit, held = digits
    plain, repaired = calibrated(model, fit), calibrated(model, fit)
    nearest(plain)
    found = round_weights(repaired, fit, bits=BITS)
    for prepared in (plain, repaired):
        recalibrate(prepared, fit)
    assert error(repaired, model, held) < 0.8 * error(plain, model, held)
    assert set(found) == {"conv1", "conv2", "conv3", "dense"}
    assert all(rounded.after < rounded.before and 0 < rounded.moved < 0.3 for rounded in found.values())


def test_the_users_model_and_everything_but_weights_stay(digits):
    model, fit, _ = digits
    before, prepared = copy.deepcopy(model.state_dict()), calibrated(model, fit)
    start = copy.deepcopy(prepared.model.state_dict())
    round_weights(prepared, fit)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    changed = {name for name, value in prepared.model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"conv1.weight", "conv2.weight", "conv3.weight", "dense.weight"}


def test_it_is_the_same_again(digits):
    model, fit, _ = digits
    one, two = calibrated(model, fit), calibrated(model, fit)
    first, second = round_weights(one, fit), round_weights(two, fit)
    assert all(torch.equal(first[name].weight, second[name].weight) for name in first)


@pytest.mark.parametrize("kind", ["resnet", "unet", "shared", "mobile", "transposed"])
def test_codes_survive_a_new_calibration_and_a_saved_file(kind):
    models = {"mobile": (MobileNet().eval(), torch.randn(4, 3, 16, 16)), "transposed": transposed(), **zoo()}
    model, example = models[kind]
    prepared = calibrated(model, [example])
    found = round_weights(prepared, [example])
    assert found
    scales = {name: prepared.weights[name].scale.clone() for name in found}
    codes = quantized_weights(prepared, found, example)
    modules = dict(prepared.model.named_modules())
    for name, rounded in found.items():
        chosen = (modules[name].folded()[0] / scales[name]).round().clamp(-128, 127) * scales[name]
        torch.testing.assert_close(codes[name], chosen, rtol=0, atol=0)
        assert torch.equal(modules[name].weight, rounded.weight)

    recalibrate(prepared, [example])
    loaded = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(prepared.model.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file))
    for other in (prepared, calibrated(loaded, [example])):
        again = quantized_weights(other, found, example)
        for name in found:
            torch.testing.assert_close(other.weights[name].scale, scales[name], rtol=1e-6, atol=0)
            steps = (again[name] - codes[name]) / scales[name]
            assert steps.abs().max() < 0.01, f"{name}: {steps.abs().max()} steps"


def transposed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2, groups=2), nn.BatchNorm2d(4))
    net[3].running_var.fill_(0.3)
    return nn.Sequential(net, nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(4, 3, 8, 8)


@given(st.integers(0, 10_000), st.floats(-30, 30), st.sampled_from(["guide", "plugin"]))
@settings(max_examples=15, deadline=None)
def test_whatever_the_batch_norm_multiplies_by_the_code_is_the_chosen_one(seed, size, divisor):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(4) * 2.0**size)
        model[1].weight[0] = 0.0  # a channel that is switched off
        model[1].running_var.uniform_(0.1, 3.0)
    x = torch.randn(8, 2, 6, 6)
    prepared = calibrated(model, [x], settings=CalibrationSettings(method="minmax", divisor=divisor))
    leaf, quantizer = writable(prepared)[0]["0"], prepared.weights["0"]
    grid = grid_of(leaf, quantizer)
    codes = torch.randint(grid.lowest, 128, grid.weight.shape).double()
    codes = torch.where(grid.held, grid.nearest(grid.weight), codes)
    rounding.write(prepared, "0", leaf, rounding.stored(leaf, grid, codes))
    alive = leaf.factor().abs() >= 1e-5
    assume(alive.any())
    found = quantized_weights(prepared, ["0"], x)["0"] / quantizer.scale
    gap = (found - codes.reshape(found.shape))[alive].abs()
    tied = grid.held.reshape(found.shape)[alive] if divisor == "plugin" else torch.zeros_like(gap, dtype=torch.bool)
    assert gap[~tied].max() < 1e-3
    assert not tied.any() or gap[tied].max() < 1.001


def test_int16_weights_are_left_alone(digits):
    model, fit, _ = digits
    prepared = calibrated(model, fit, QDtype.qint16)
    for quantizer in prepared.weights.values():
        quantizer.retype(QDtype.qint16)
    assert writable(prepared) == ({}, {})
    assert round_weights(prepared, fit) == {}


class Hard(nn.Module):
    """Weights that cannot be written: of a function, of another parameter, of two modules."""

    def __init__(self):
        super().__init__()
        self.plain, self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.bare = nn.Parameter(torch.randn(6, 6))
        self.computed = parametrize.register_parametrization(nn.Linear(6, 6), "weight", Halved())

    def forward(self, x):
        return self.computed(F.relu(F.linear(self.two(F.relu(self.one(self.plain(x)))), self.bare)))


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def test_weights_that_cannot_be_written_are_named_with_the_reason(monkeypatch):
    x = torch.randn(8, 6)
    prepared = calibrated(Hard().eval(), [x])
    chosen, skipped = writable(prepared)
    assert set(chosen) == {"plain"}
    reasons = {name: reason for name, reason in skipped.items() if "." not in name and "[" not in name}
    assert reasons["one"] == reasons["two"] == "another module holds the same weight"
    assert "computed from other parameters" in reasons["computed"]
    assert len(skipped) == 4
    assert any("argument of a function" in reason for reason in skipped.values())
    assert set(round_weights(prepared, [x])) == {"plain"}
    monkeypatch.setattr(rounding, "LARGEST", 5)
    assert "its 6 inputs an output are more than the limit of 5" in writable(prepared)[1]["plain"]


def test_moments_that_do_not_fit_into_memory_take_several_passes(digits, monkeypatch):
    model, fit, held = digits
    whole = calibrated(model, fit)
    assert len(rounding.in_memory(writable(whole)[0])) == 1
    round_weights(whole, fit)
    monkeypatch.setattr(rounding, "MEMORY", 4 * 144**2)
    prepared = calibrated(model, fit)
    assert [*map(len, rounding.in_memory(writable(prepared)[0]))] == [1, 1, 1, 1]
    assert len(round_weights(prepared, fit)) == 4
    assert error(prepared, model, held) < 1.1 * error(whole, model, held)
    monkeypatch.setattr(rounding, "PASSES", 3)
    assert "does not fit into 3 passes" in writable(prepared)[1]["dense"]


def test_moments_are_those_of_the_quantized_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    x = torch.randn(16, 4)
    prepared = calibrated(model, [x])
    chosen = writable(prepared)[0]
    found = rounding.input_moments(prepared, chosen, [x[:9], x[9:]])
    scale = prepared.outputs[prepared.graph.by_name["0"].inputs[0]].scale
    on_grid = (x / scale).round().clamp(-128, 127) * scale
    torch.testing.assert_close(found["0"][0], on_grid.T @ on_grid)
