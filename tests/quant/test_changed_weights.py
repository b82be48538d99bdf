"""Weights that change after calibration: their scales follow, and it is said that those of activations do not."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import qflow
from qflow.core.errors import ModelError
from qflow.core.settings import QatSettings
from qflow.quant.train.qat_state import qat_state


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten()).eval()


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def calibrated(model):
    prepared = qflow.prepare(model, X)
    qflow.calibrate(prepared, [X])
    return prepared


def weight_scales(prepared):
    return {name: torch.tensor(s) for name, s in qflow.scales(prepared).items() if name.endswith(".weight")}


def same_weight_scales(one, other):
    found, expected = weight_scales(one), weight_scales(other)
    return all(torch.allclose(found[name], expected[name], rtol=1e-5) for name in expected)


@torch.no_grad()
def error(prepared, model, x=X):
    right = model(x)
    return float((prepared(x) - right).norm() / right.norm())


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


def multiplied(model):
    model[0].weight.mul_(2.0)


def merged(model):
    """As a LoRA adapter is merged: autograd does not notice writes through `.data`."""
    model[0].weight.data += torch.full_like(model[0].weight, 0.3)


def replaced(model):
    model[3].weight = nn.Parameter(model[3].weight * 3.0)


def pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.3)
    model[0].weight_orig.mul_(2.0)


def parametrized(model):
    parametrize.register_parametrization(model[0], "weight", Doubled())


def normalized(model):
    nn.utils.parametrizations.weight_norm(model[0])
    model[0].parametrizations.weight.original0.mul_(2.0)


def norm_edited(model):
    model[1].running_var.mul_(0.25)


@pytest.mark.parametrize("edit", [multiplied, merged, replaced, pruned, parametrized, normalized, norm_edited])
@torch.no_grad()
def test_scales_follow_a_weight_and_the_stale_activations_are_named(edit):
    model = net()
    prepared = calibrated(model)
    prepared(X)  # quantized weights are cached from here
    edit(prepared.model)
    edit(model)
    with pytest.warns(UserWarning, match="changed after calibration.*calibrate again"):
        prepared(X)
    assert same_weight_scales(prepared, calibrated(model))
    assert any("changed after calibration" in f.message for f in qflow.check(prepared).findings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        prepared(X)
    qflow.calibrate(prepared, [X])
    assert error(prepared, model) < 0.05
    assert not [f for f in qflow.check(prepared).findings if "changed" in f.message]


@torch.no_grad()
def test_scales_and_states_are_those_of_the_present_weights():
    model = net()
    prepared, loaded = calibrated(model), qflow.prepare(net(1), X)
    multiplied(prepared.model)
    multiplied(model)
    assert same_weight_scales(prepared, calibrated(model))
    prepared = calibrated(net())
    multiplied(prepared.model)
    loaded.load_state_dict(prepared.state_dict())
    with pytest.warns(UserWarning, match="changed after calibration"):
        assert torch.equal(prepared(X), loaded(X))


def test_the_check_notices_without_a_forward_pass():
    prepared = calibrated(net())
    prepared.model[0].weight.data[0, 0, 0, 0] = 9.0
    found = [f for f in qflow.check(prepared).findings if "changed after calibration" in f.message]
    assert [(f.op, f.level) for f in found] == [("0", "check")]


@torch.no_grad()
def test_a_call_with_other_weights_uses_their_scales_and_leaves_its_own():
    model, other = net(), net()
    other[3].weight.mul_(0.2)  # activations stay within their range
    prepared = calibrated(model)
    before = prepared(X), qflow.scales(prepared)
    weights = {f"model.{name}": value for name, value in other.state_dict().items()}
    with pytest.warns(UserWarning, match="changed after calibration"):
        swapped = torch.func.functional_call(prepared, weights, (X,))
    right = other(X)
    assert float((swapped - right).norm() / right.norm()) < 0.05
    assert torch.equal(prepared(X), before[0])
    assert qflow.scales(prepared) == before[1]
    assert not [f for f in qflow.check(prepared).findings if "changed" in f.message]


def test_loaded_float_weights_forget_the_scales_of_activations():
    other = net(1)
    with torch.no_grad():
        other[0].weight.mul_(6.0)
        other[3].weight.mul_(4.0)
    prepared = calibrated(net())
    prepared.load_float_state_dict(net().state_dict())  # the weights that it has: nothing becomes stale
    assert error(prepared, net()) < 0.05
    prepared.load_float_state_dict(other.state_dict())
    with pytest.raises(ModelError, match=r"quant\[input\] lost its scale when other float weights were loaded\. Cal"):
        prepared(X)
    found = [(f.op, f.message) for f in qflow.check(prepared).findings if f.level == "error"]
    assert found == [("model", "other float weights were loaded: the scales of activations are gone, calibrate again")]
    assert same_weight_scales(prepared, calibrated(other))
    qflow.calibrate(prepared, [X])
    assert torch.equal(prepared(X), calibrated(other)(X))


@torch.no_grad()
def test_other_dtypes_copies_and_loaded_states_are_no_other_weights():
    prepared = calibrated(net())
    expected, scales = prepared(X), qflow.scales(prepared)
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    loaded = qflow.prepare(net(1), X)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(loaded(X), expected)
        assert torch.equal(copy.deepcopy(prepared)(X), expected)
        half = copy.deepcopy(prepared).half()
        half(X.half())
        half.float()(X)
        copy.deepcopy(prepared).bfloat16()(X.bfloat16())
        double = copy.deepcopy(prepared).double()
        assert torch.allclose(double(X.double()).float(), expected, atol=1e-2)
    assert qflow.scales(prepared) == qflow.scales(loaded) == scales
    loaded.model[0].weight.mul_(2.0)
    with pytest.warns(UserWarning, match="changed after calibration"):
        loaded(X)


@pytest.mark.parametrize("moving", [True, False])
def test_training_changes_weights_by_its_own_rules(moving):
    prepared = calibrated(net())
    before = weight_scales(prepared)
    with qat_state(prepared, QatSettings(moving_weights=moving)), torch.no_grad():
        for parameter in prepared.model.parameters():
            parameter.mul_(1.5)
        prepared(X)
    after = weight_scales(prepared)
    assert all(torch.equal(before[n], after[n]) != moving for n in before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(X)  # these are the weights that the scales belong to
    assert all(torch.equal(after[n], scale) for n, scale in weight_scales(prepared).items())


@torch.no_grad()
def test_the_weight_of_a_functional_is_followed_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return nn.functional.linear(x, self.w)

    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    prepared = qflow.prepare(Own().eval(), x)
    qflow.calibrate(prepared, [x])
    prepared.model.w.mul_(0.1)
    with pytest.warns(UserWarning, match="changed after calibration"):
        found = prepared(x)
    right = x @ (0.1 * Own().w).T
    assert float((found - right).norm() / right.norm()) < 0.05
