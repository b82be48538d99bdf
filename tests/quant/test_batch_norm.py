"""Batch norms in training: the float model's outputs, gradients and statistics where nothing rounds (float64)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.models import Block, ResNet, UNet, revive
from torch import nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.settings import NORM_MODES, QatSettings
from qflow.quant.model.prepare import prepare
from qflow.quant.model.weighted import WeightedLeaf, set_norm_mode
from qflow.quant.trace.calling import named_tensors
from qflow.quant.train.qat_state import qat_state
from qflow.quant.values.fake_quant import FakeQuant


class Mixed(nn.Module):
    """Conv, linear, grouped transposed conv, each with a batch norm of its own settings."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, eps=1e-2, momentum=0.4)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2, bias=False)
        self.bn_up = nn.BatchNorm2d(6, eps=1e-3, momentum=None)
        self.plain = nn.Conv2d(6, 4, 1, bias=False)
        self.bn_plain = nn.BatchNorm2d(4)
        self.lin = nn.Linear(4, 5)
        self.bn_lin = nn.BatchNorm1d(5)

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        y = self.bn_plain(self.plain(F.relu(self.bn_up(self.up(y)))))
        return self.bn_lin(self.lin(y.mean(dim=(2, 3))))


MODELS = {"mixed": Mixed, "resnet": ResNet, "unet": UNet}
LIVE = [mode for mode in NORM_MODES if mode != "fuse_bn"]


def made(name):
    torch.manual_seed(0)
    model = revive(MODELS[name]()).double()
    if name == "mixed":
        model.bn_plain.weight = model.bn_plain.bias = None  # affine=False
    return model, torch.randn(6, 3, 16, 16, dtype=torch.float64)


def transparent(prepared):
    """Weight quantizers on, on an identity grid: only the rearranged arithmetic is left."""
    for quantizer in prepared.weights.values():
        quantizer.enabled, quantizer.dtype = True, QDtype.qint16
        quantizer.set_scale(torch.full_like(quantizer.scale, 1.0))
        quantizer.forward = lambda weight, scale=None: weight
    return prepared


def step(model, x):
    out = model(x)
    sum((t.square() * torch.linspace(0.5, 2, t.numel()).view(t.shape)).sum() for _, t in named_tensors(out)).backward()
    return out


def close(a, b):
    return all(
        torch.allclose(x, y, rtol=1e-8, atol=1e-9 * float(x.detach().abs().max() + 1))
        for (_, x), (_, y) in zip(named_tensors(a), named_tensors(b), strict=True)
    )


@pytest.mark.parametrize("mode", LIVE)
@pytest.mark.parametrize("grid", ["off", "identity"])
@pytest.mark.parametrize("name", list(MODELS))
def test_outputs_gradients_and_statistics_are_the_float_models(name, grid, mode):
    model, x = made(name)
    prepared = prepare(model, x)
    if grid == "identity":
        transparent(prepared)
    set_norm_mode(prepared.model, mode)
    model.train(), prepared.train()
    for _ in range(2):  # statistics of the first step are in the second
        assert close(step(model, x), step(prepared, x))
    if grid == "identity":
        assert set(prepared.weights) <= prepared.ran
    for (key, a), (_, b) in zip(model.named_parameters(), prepared.model.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-7, atol=1e-8 * float(a.grad.abs().max() + 1)), key
    for (key, a), (_, b) in zip(model.named_buffers(), prepared.model.named_buffers(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-9, atol=1e-12), key
    assert any(
        float((b - c).abs().max()) > 1e-3
        for (_, b), (_, c) in zip(model.named_buffers(), made(name)[0].named_buffers(), strict=True)
    )  # the statistics did live


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("grid", ["off", "identity"])
def test_fuse_bn_is_the_float_model_with_its_norms_in_eval_mode(name, grid):
    model, x = made(name)
    prepared = prepare(model, x)
    if grid == "identity":
        transparent(prepared)
    set_norm_mode(prepared.model, "fuse_bn")
    statistics = {k: v.clone() for k, v in prepared.model.named_buffers()}
    prepared.train()
    assert close(step(model.eval(), x), step(prepared, x))
    assert all(torch.equal(v, statistics[k]) for k, v in prepared.model.named_buffers())
    float_grads = {k: p.grad for k, p in model.named_parameters()}
    gammas = {f"{prepared.plan.folds[path]}.weight" for path in prepared.plan.folds}
    assert gammas
    for key, parameter in prepared.model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, float_grads[key], rtol=1e-7, atol=1e-9), key
        else:
            assert key in gammas or key.endswith("bias")
    set_norm_mode(prepared.model, "with_bn")
    assert all(p.requires_grad for p in prepared.model.parameters())
    assert all(m.training for m in prepared.model.modules())


def calibrated(model, x, scale=0.02):
    prepared = prepare(model, x)
    for quantizer in prepared.outputs.values():
        quantizer.dtype = QDtype.float32
    with torch.no_grad():
        for leaf in (m for m in prepared.model.modules() if isinstance(m, WeightedLeaf)):
            quantizer = prepared.weights[leaf.qflow_path]
            quantizer.set_scale(quantizer.measured(leaf.folded()[0]))
    return prepared


@pytest.mark.parametrize("name", list(MODELS))
def test_reverse_fold_evaluates_folded_what_it_trained_unfolded(name):
    """After training, conv with the folded weight is the training form with the norm on its running statistics."""
    model, x = made(name)
    prepared = calibrated(model, x)
    settings = QatSettings(mode="with_bn_reverse_fold", steps=3)
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    with qat_state(prepared, settings):
        for _ in range(3):
            optimizer.zero_grad()
            step(prepared, x)
            optimizer.step()
    with torch.no_grad(), prepared.quantized():
        folded = prepared(x)
        prepared.train()
        for module in prepared.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0  # the running statistics stand still ...
                module.forward = lambda input, m=module: F.batch_norm(  # ... and are what normalizes
                    input, m.running_mean, m.running_var, m.weight, m.bias, False, 0.0, m.eps
                )
        unfolded = prepared(x)
    assert close(folded, unfolded)
    assert not close(folded, model(x))  # it quantizes and has learnt


@pytest.mark.parametrize("mode", LIVE)
def test_a_dead_channel_trains_and_gives_no_nan(mode):
    """P6: gamma 0, as zero-init residuals have it; its gradient is alive."""
    torch.manual_seed(0)
    model = revive(Block(4))
    with torch.no_grad():
        model.bn2.weight.zero_()
        model.bn1.weight[1] = -1e-9
    x = torch.randn(4, 4, 8, 8)
    prepared = calibrated(nn.Sequential(model).eval(), x)
    optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
    with qat_state(prepared, QatSettings(mode=mode)):
        for _ in range(3):
            optimizer.zero_grad()
            step(prepared, x)
            optimizer.step()
            assert all(torch.isfinite(p.grad).all() for p in prepared.parameters() if p.grad is not None)
    assert (prepared.model[0].bn2.weight.abs() > 1e-4).all()
    with torch.no_grad(), prepared.quantized():
        assert torch.isfinite(prepared(x)).all()


def test_with_bn_evaluates_folded_and_changes_only_the_rounding():
    """The stated small change: a scale a channel makes fq(w * factor) = factor * fq(w) up to the end codes."""
    model, x = made("resnet")
    prepared = calibrated(model, x)
    conv = prepared.model.stem[0]
    quantizer = prepared.weights["stem.0"]
    quantizer.enabled = True
    weight, _ = conv._quantized(quantizer)
    factor = conv.factor().view(-1, 1, 1, 1)
    unfolded = FakeQuant("w", 8, 0, 4)
    unfolded.enabled = True
    unfolded.set_scale(quantizer.scale / factor.abs())
    difference = (weight - factor * unfolded(conv.weight)).abs() / quantizer.scale
    assert (difference < 0.01).float().mean() > 0.98
    assert difference.max() <= 1.01


def test_the_users_own_eps_momentum_and_dropout_are_respected():
    """P2, P3, P4."""

    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
            self.drop = nn.Dropout(0.3)

        def forward(self, x):
            return F.dropout(self.drop(self.bn(self.conv(x))), 0.2, self.training)

    model = revive(Dropped())
    x = torch.randn(4, 3, 8, 8)
    prepared = calibrated(model, x)
    with qat_state(prepared, QatSettings(mode="with_bn_reverse_fold")):
        zero = (prepared(x) == 0).float().mean()
    assert 0.34 < zero < 0.54  # 1 - 0.7 * 0.8 = 0.44
    assert (prepared.model.bn.eps, prepared.model.bn.momentum, prepared.model.drop.p) == (1e-3, 0.03, 0.3)
    twin = copy.deepcopy(model).train()
    twin.bn(twin.conv(x))
    assert torch.allclose(prepared.model.bn.running_mean, twin.bn.running_mean, atol=2e-3)
    with torch.no_grad(), prepared.quantized():
        assert not (prepared(x) == 0).any()


def test_an_unknown_mode_is_refused():
    with pytest.raises(ConfigError, match="qat.mode is one of fuse_bn, with_bn, with_bn_reverse_fold, but got 'bn'"):
        set_norm_mode(nn.Sequential(), "bn")
