"""No scale is below float32 epsilon: where values would need a smaller one, it is named, and what is advised helps."""

import pytest
import torch
from torch import nn

import qflow

INT8, INT16 = qflow.QDtype.qint8, qflow.QDtype.qint16


class Tiny(nn.Module):
    """Two layers that undo each other's factor, so that the function is the same for every factor."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 4, bias=False)
        with torch.no_grad():
            self.a.weight.mul_(1e-5 * factor)
            self.b.weight.mul_(1e5 / factor)

    def forward(self, x):
        return self.b(self.a(x))


class Mean(nn.Module):
    """Attention over 2048 nearly equal scores, relative to their mean; `late` divides by the sum behind the product."""

    def __init__(self, late):
        super().__init__()
        torch.manual_seed(0)
        self.late, self.q = late, nn.Linear(8, 8)

    def forward(self, x):
        scores = self.q(x) @ x.transpose(1, 2)
        if not self.late:
            return torch.softmax(scores, -1) * 2048.0 - 1.0
        shares = torch.exp(scores - scores.amax(-1, keepdim=True))
        return shares * (2048.0 / shares.sum(-1, keepdim=True)) - 1.0


@torch.no_grad()
def error_and_findings(model, inputs, dtype):
    model.eval()
    prepared = qflow.prepare(model, inputs, qconfig_setter=qflow.TemplateSetter(dtype))
    qflow.calibrate(prepared, [inputs], qflow.CalibrationSettings(method="minmax"))
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    right = model(*inputs)
    error = float((prepared(*inputs) - right).norm() / right.norm())
    return error, [(f.op, f.message) for f in qflow.check(prepared).findings if "device's floor" in f.message]


@pytest.mark.parametrize(("dtype", "steps", "finer"), [(INT8, 128, 1.49), (INT16, 32768, 382)])
def test_values_at_the_floor_are_named_and_larger_values_are_resolved(dtype, steps, finer):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) * 0.5
    before, found = error_and_findings(Tiny(1.0), x, dtype)
    assert [op for op, _ in found] == ["a", "a"]
    values, weight = (message for _, message in found)
    needed = float(values.partition("epsilon), ")[2].split(" ")[0])
    assert f"of {steps} steps: the scale is at the device's floor, 1.19e-07 (float32 epsilon)" in values
    assert weight.startswith("|weight| up to 2.49e-06 gets 20.9 of 128 steps")
    after, found = error_and_findings(Tiny(max(needed, 1000.0)), x, dtype)
    assert found == []
    assert after < 0.6 * before
    assert needed == pytest.approx(finer, rel=0.1)


def test_a_softmax_at_the_floor_is_divided_by_its_sum_later():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2048, 8, generator=generator) * 0.02
    before, found = error_and_findings(Mean(late=False), x, INT16)
    assert [op for op, _ in found] == ["[softmax]"]
    assert "take exp(x - max) in its place and divide what reads it by the sum" in found[0][1]
    after, found = error_and_findings(Mean(late=True), x, INT16)
    assert found == []
    assert after < before


def test_channels_without_weights_are_not_at_the_floor():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight[1] = 0.0
    assert error_and_findings(model, torch.randn(8, 4), INT8)[1] == []


class Normed(nn.Module):
    """A norm of small values; `times` makes them larger without changing the result."""

    def __init__(self, norm, size, times=1.0, eps=1e-12):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(16, 16), norm(16, eps=eps * times**2), nn.Linear(16, 4)
        with torch.no_grad():
            self.a.weight.mul_(size * times)
            self.a.bias.mul_(size * times)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_a_variance_at_the_floor_is_named_and_larger_values_are_resolved(norm, size):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    before, found = error_and_findings(Normed(norm, size), x, INT8)
    message = next(text for op, text in found if op == "norm")
    times = float(message.partition("norm reads ")[2].split(" ")[0])
    assert f"its eps {times**2:g} times" in message
    after, found = error_and_findings(Normed(norm, size, times), x, INT8)
    assert found == []
    assert after < 0.02 < 0.05 < before


@pytest.mark.parametrize(("size", "eps"), [(1.0, 1e-12), (1e-2, 1e-12), (1e-4, 1e-5)])
def test_a_variance_whose_rounding_is_not_seen_is_not_named(size, eps):
    """It is large enough, or its eps is."""
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    error, found = error_and_findings(Normed(nn.LayerNorm, size, eps=eps), x, INT8)
    assert found == []
    assert error < 0.02
