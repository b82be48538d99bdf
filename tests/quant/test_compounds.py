"""Values inside norms and softmaxes: int16 on the device whatever the operator's qconfig, float16 in fp16."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.norms import calibrated
from support.replays import Made
from torch import nn

import qflow
from qflow.core.dtype import QDtype


def tokens(*shape, seed=0, dtype=torch.float64):
    """Values of tokens whose sizes differ by orders of magnitude, one of them an outlier."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=dtype)
    x *= torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator, dtype=dtype))
    x[0] *= 30.0
    return x + 0.1


def trained(module):
    """`module` with weights and biases as after a training."""
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) + 1.0
    return module


def with_mask(x):
    mask = torch.zeros(x.shape[-2:], dtype=x.dtype).masked_fill(torch.ones(x.shape[-2:]).triu(1).bool(), -torch.inf)
    return x + mask


NORM = ("var_mean.pre_mean", "var_mean.var", "rsqrt")
SOFTMAX = ("sub", "exp", "sum", "reciprocal")
WEIGHT = 1.0 + torch.arange(12, dtype=torch.float64) / 4
CASES = {
    "LayerNorm": (trained(nn.LayerNorm(12)), (6, 5, 12), (*NORM, "mul", "weight_mul")),
    "LayerNorm of two axes": (trained(nn.LayerNorm((5, 12))), (6, 5, 12), (*NORM, "mul", "weight_mul")),
    "LayerNorm without bias": (trained(nn.LayerNorm(12, bias=False)), (6, 5, 12), (*NORM, "mul")),
    "LayerNorm without weight": (nn.LayerNorm(12, elementwise_affine=False), (6, 5, 12), NORM),
    "layer_norm": (lambda x: F.layer_norm(x, (12,), None, WEIGHT), (6, 5, 12), (*NORM, "mul")),
    "torch.layer_norm": (lambda x: torch.layer_norm(x, [12], WEIGHT), (6, 5, 12), (*NORM, "mul")),
    "GroupNorm": (trained(nn.GroupNorm(4, 12)), (6, 12, 5, 3), (*NORM, "mul", "weight_mul")),
    "group_norm": (lambda x: F.group_norm(x, 3, weight=WEIGHT, eps=1e-3), (6, 12, 9), (*NORM, "mul")),
    "InstanceNorm": (trained(nn.InstanceNorm2d(12, affine=True)), (6, 12, 5, 3), (*NORM, "mul", "weight_mul")),
    "instance_norm": (lambda x: F.instance_norm(x), (6, 12, 5, 3), NORM),
    "RMSNorm": (trained(nn.RMSNorm(12)), (6, 5, 12), ("mean", "rsqrt", "mul")),
    "rms_norm": (lambda x: F.rms_norm(x, (12,), eps=1e-4), (6, 5, 12), ("mean", "rsqrt")),
    "Softmax": (nn.Softmax(-1), (6, 5, 12), SOFTMAX),
    "Softmax2d": (nn.Softmax2d(), (6, 12, 5, 3), SOFTMAX),
    "softmax": (lambda x: F.softmax(x, dim=1, dtype=torch.float64), (6, 5, 12), SOFTMAX),
    "Tensor.softmax": (lambda x: x.softmax(-1), (6, 5, 12), SOFTMAX),
    "LogSoftmax": (nn.LogSoftmax(-1), (6, 5, 12), ("sub", "exp", "sum", "log")),
    "masked log_softmax": (lambda x: F.log_softmax(with_mask(x), -1), (6, 12, 12), ("sub", "exp", "sum", "log")),
}


def made(operator):
    """A model of this operator alone, and the name of the operator in it."""
    if isinstance(operator, nn.Module):
        return Made(lambda own, x: own.norm(x), norm=copy.deepcopy(operator)).double().eval()
    return Made(lambda own, x: operator(x)).eval()


# ---- by hand, in NumPy


class Device:
    """Rounds named values to int16 with the scales that `seen` gives: 1.25 times the largest |x| over 32768."""

    def __init__(self, seen=None):
        self.seen, self.largest = seen, {}

    def __call__(self, name, x):
        self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(x).max()))
        if self.seen is None:
            return x
        scale = float(np.float32(self.seen[name] * 1.25 / 32768))
        return np.clip(np.rint(x / scale), -32768, 32767) * scale


def norm(device, x, axes, weight, bias, eps):
    d = x - device("var_mean.pre_mean", x.mean(axes, keepdims=True))
    y = d * device("rsqrt", 1.0 / np.sqrt(device("var_mean.var", (d * d).mean(axes, keepdims=True)) + eps))
    return affine(device, y, weight, bias)


def affine(device, y, weight, bias):
    if weight is not None:
        y = device("mul", y) * weight
    return y if bias is None else device("mul" if weight is None else "weight_mul", y) + bias


def groups(device, x, count, weight, bias, eps):
    shape, grid = x.shape, (-1,) + (1,) * (x.ndim - 2)
    flat = norm(device, x.reshape(shape[0], count, -1), -1, None, None, eps).reshape(shape)
    return affine(device, flat, *(None if t is None else t.reshape(grid) for t in (weight, bias)))


def root_mean_square(device, x, weight, eps):
    y = x * device("rsqrt", 1.0 / np.sqrt(device("mean", (x * x).mean(-1, keepdims=True)) + eps))
    return affine(device, y, weight, None)


def softmax(device, x, axis):
    e = device("exp", np.exp(device("sub", np.maximum(x - x.max(axis, keepdims=True), -18.0))))
    return e * device("reciprocal", 1.0 / device("sum", e.sum(axis, keepdims=True)))


def log_softmax(device, x):
    sub = np.where(np.isinf(x), 0.0, x - x.max(-1, keepdims=True))
    sub = np.where(np.isinf(x), -np.inf, device("sub", sub))
    return sub - device("log", np.log(device("sum", device("exp", np.exp(sub)).sum(-1, keepdims=True))))


def parameters(name):
    module = CASES[name][0]
    return [None if p is None else p.detach().double().numpy() for p in (module.weight, getattr(module, "bias", None))]


FINEST = float(np.finfo(np.float64).eps)
BY_HAND = {
    "LayerNorm": lambda d, x: norm(d, x, -1, *parameters("LayerNorm"), 1e-5),
    "LayerNorm of two axes": lambda d, x: norm(d, x, (-2, -1), *parameters("LayerNorm of two axes"), 1e-5),
    "LayerNorm without bias": lambda d, x: norm(d, x, -1, *parameters("LayerNorm without bias"), 1e-5),
    "LayerNorm without weight": lambda d, x: norm(d, x, -1, None, None, 1e-5),
    "layer_norm": lambda d, x: norm(d, x, -1, None, WEIGHT.numpy(), 1e-5),
    "torch.layer_norm": lambda d, x: norm(d, x, -1, WEIGHT.numpy(), None, 1e-5),
    "GroupNorm": lambda d, x: groups(d, x, 4, *parameters("GroupNorm"), 1e-5),
    "group_norm": lambda d, x: groups(d, x, 3, WEIGHT.numpy(), None, 1e-3),
    "InstanceNorm": lambda d, x: groups(d, x, 12, *parameters("InstanceNorm"), 1e-5),
    "instance_norm": lambda d, x: groups(d, x, 12, None, None, 1e-5),
    "RMSNorm": lambda d, x: root_mean_square(d, x, parameters("RMSNorm")[0], FINEST),
    "rms_norm": lambda d, x: root_mean_square(d, x, None, 1e-4),
    "Softmax": lambda d, x: softmax(d, x, -1),
    "Softmax2d": lambda d, x: softmax(d, x, 1),
    "softmax": lambda d, x: softmax(d, x, 1),
    "Tensor.softmax": lambda d, x: softmax(d, x, -1),
    "LogSoftmax": lambda d, x: log_softmax(d, x),
    "masked log_softmax": lambda d, x: log_softmax(d, with_mask(torch.from_numpy(x)).numpy()),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_kind_computes_what_the_formula_with_rounded_values_gives(name):
    operator, shape, steps = CASES[name]
    model, x = made(operator), tokens(*shape)
    prepared = calibrated(model, x)
    (node,) = (n for n in prepared.graph.quantized if n.inner)
    assert node.inner == tuple(f"{node.quantizer}.{step}" for step in steps)
    assert {prepared.outputs[n].dtype for n in node.inner} == {QDtype.qint16}
    exact = Device()
    expected = BY_HAND[name](exact, x.numpy())
    assert np.allclose(expected, model(x).numpy(), rtol=1e-6, atol=1e-6)  # softmax: the bound at -18
    assert tuple(exact.largest) == steps
    expected = BY_HAND[name](Device(exact.largest), x.numpy())
    with prepared.only(outputs=node.inner):
        found = prepared(x)
    assert np.allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert not torch.equal(found, model(x))
    with prepared.only(outputs=node.inner):
        assert prepared(x[:0]).shape == (0, *shape[1:])
    x.requires_grad_()
    with torch.enable_grad(), prepared.only(outputs=node.inner):
        trained = prepared(x)
        trained.nan_to_num(neginf=0.0).sum().backward()
    assert np.allclose(trained.detach().numpy(), expected, rtol=1e-7, atol=1e-9)
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_without_quantizers_and_in_calibration_the_float_graph_is_bit_exact(name):
    operator, shape, _ = CASES[name]
    model, x = made(operator), tokens(*shape)
    prepared = calibrated(model, x)
    qflow.set_fake_quantize(prepared, qflow.FakeQuantState.FLOAT)
    assert torch.equal(prepared(x), model(x))
    qflow.set_fake_quantize(prepared, qflow.FakeQuantState.CALIBRATION)
    assert torch.equal(prepared(x), model(x))
