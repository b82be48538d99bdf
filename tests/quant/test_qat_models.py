"""Training what users write: shared modules, activation checkpointing, in-place operators, changed weights."""

import pytest
import torch
import torch.nn.functional as F
from support.models import Block, ResNet, Shared, revive, zoo
from support.training import calibrated, data, loss, same, sgd, small
from torch import nn
from torch.utils.checkpoint import checkpoint

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.settings import NORM_MODES, QatSettings
from qflow.quant.trace.calling import named_tensors
from qflow.quant.train.qat import train
from qflow.quant.train.qat_state import qat_state


@pytest.mark.parametrize("mode", NORM_MODES)
@pytest.mark.parametrize("name", list(zoo()))
def test_every_network_of_the_zoo_takes_a_step(name, mode):
    model, example = zoo()[name]
    prepared, _ = calibrated(model, example)
    before = {k: v.clone() for k, v in prepared.model.named_parameters()}
    report = train(
        prepared,
        [(example, example)] * 2,
        lambda out, _: sum(t.square().mean() for _, t in named_tensors(out)),
        sgd(prepared, 0.01),
        settings=QatSettings(steps=2, mode=mode),
    )
    assert report.finished
    changed = [k for k, v in prepared.model.named_parameters() if not torch.equal(v, before[k])]
    assert len(changed) >= 0.5 * len([k for k in before if "never" not in k])


def test_a_shared_convolution_trains():
    """P13: its quantizers run twice before the backward pass."""
    prepared, _ = calibrated(revive(Shared()), torch.randn(2, 4, 8, 8))
    report = train(
        prepared,
        [(torch.randn(2, 4, 8, 8), None)] * 3,
        lambda out, _: out.square().mean(),
        sgd(prepared),
        settings=QatSettings(steps=3, mode="with_bn_reverse_fold"),
    )
    assert report.losses[-1] < report.losses[0]
    assert prepared.model.conv.weight.grad.abs().sum() > 0


class Checkpointed(nn.Module):
    """A block called twice and a part of a forward, recomputed or not."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = Block(4)
        self.own = Block(4)
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.recompute = True
        self.reentrant = False

    def part(self, x):
        return F.relu(self.bn(self.conv(x)) * 0.5 + x.sigmoid())

    def again(self, function, x):
        return checkpoint(function, x, use_reentrant=self.reentrant) if self.recompute else function(x)

    def forward(self, x):
        y = self.again(self.block, self.stem(x))
        y = self.again(self.own, y)
        y = self.again(self.block, y)
        return self.again(self.part, y).mean((2, 3))


@pytest.mark.parametrize("mode", NORM_MODES)
def test_activation_checkpointing_changes_no_gradient(mode):
    """P8, with moving scales and live statistics, which a recomputation finds changed."""
    torch.manual_seed(0)
    model, x = revive(Checkpointed()), torch.randn(4, 3, 8, 8)
    prepared, _ = calibrated(model, x)
    grads, scales = [], []
    for recompute in (True, False):
        prepared.model.recompute = recompute
        state = {k: v.clone() for k, v in prepared.state_dict().items()}
        with qat_state(prepared, QatSettings(mode=mode)):
            prepared(x * 3).square().sum().backward()
            assert not prepared.unseen
            scales.append({n: q.scale.clone() for n, q in prepared.outputs.items()})
        grads.append({k: p.grad.clone() for k, p in prepared.model.named_parameters() if p.grad is not None})
        prepared.load_state_dict(state)
        prepared.zero_grad()
    assert same(*grads) and same(*scales)
    assert all(g.abs().sum() > 0 for k, g in grads[0].items() if k.endswith("weight"))


def test_reentrant_checkpointing_is_refused():
    model, x = revive(Checkpointed()), torch.randn(2, 3, 8, 8)
    prepared, _ = calibrated(model, x)
    prepared.model.reentrant = True
    with qat_state(prepared, QatSettings()), pytest.raises(ModelError, match="Pass use_reentrant=False"):
        prepared(x)


class InPlace(nn.Module):
    """The in-place forms that users write, one after another."""

    def __init__(self, inplace):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(5))
        self.act = nn.SiLU(inplace=inplace)
        self.inplace = inplace

    def forward(self, x):
        a, b, c, d, e = (conv(x) * 1.0 for conv in self.convs)
        a = self.act(a)
        if self.inplace:
            F.relu_(b)
            b += a
            F.hardswish(c, inplace=True)
            F.relu6(c, True)
            d.sigmoid_()
            e.mul_(d).add_(c)
        else:
            b = F.relu(b)
            b = b + a
            c = F.relu6(F.hardswish(c))
            d = d.sigmoid()
            e = (e * d) + c
        return b * e


def test_in_place_operators_train_as_their_out_of_place_forms():
    x = torch.randn(2, 3, 6, 6)
    results = []
    for inplace in (True, False):
        torch.manual_seed(0)
        prepared, _ = calibrated(InPlace(inplace).eval(), x)
        with qat_state(prepared, QatSettings()):
            out = prepared(x)
            out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in prepared.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(t.abs().sum() > 0 for t in results[0])


def test_operators_that_only_training_runs_are_reported():
    class Auxiliary(ResNet):
        def forward(self, x):
            out = super().forward(x)
            return out + torch.tanh(out) if self.training else out

    prepared, _ = calibrated(revive(Auxiliary()), torch.randn(4, 3, 16, 16))
    report = train(prepared, data(), loss, sgd(prepared), settings=QatSettings(steps=1))
    assert report.findings[0].startswith("2 operators run in training only and stay float, ")


def test_a_weight_that_changes_is_quantized_anew():
    """P12: the cache knows versions, identity, storage; and nothing is cached with gradients."""
    prepared = small()
    x, conv = torch.randn(2, 3, 16, 16), prepared.model.stem[0]

    def fresh():
        quantizer = prepared.weights["stem.0"]
        quantizer.cached = None
        return prepared(x)

    with torch.no_grad(), prepared.quantized():
        first = prepared(x)
        kept = prepared.weights["stem.0"].cached
        assert torch.equal(prepared(x), first) and prepared.weights["stem.0"].cached is kept
        for change in (
            lambda: conv.weight.mul_(0.5),
            lambda: prepared.model.stem[1].running_var.add_(1.0),
            lambda: prepared.model.stem[1].weight.neg_(),
            lambda: setattr(conv, "weight", nn.Parameter(torch.rand_like(conv.weight))),
            lambda: setattr(conv.weight, "data", torch.rand_like(conv.weight)),
            lambda: prepared.weights["stem.0"].set_scale(prepared.weights["stem.0"].scale * 0.5),
            lambda: setattr(prepared.weights["stem.0"], "dtype", QDtype.qint16),
        ):
            change()
            now = prepared(x)
            assert not torch.equal(now, first) and torch.equal(now, fresh())
            first = now
    conv.weight.data.mul_(3.0)  # no version tells of it: the next switch does
    with torch.no_grad(), prepared.quantized():
        assert torch.equal(prepared(x), fresh())
    with prepared.quantized():
        prepared(x)
        assert prepared.weights["stem.0"].cached is None
    with torch.inference_mode(), prepared.quantized():
        assert torch.equal(prepared(x), fresh())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fuse_bn", pytest.param("with_bn", marks=pytest.mark.proof), "with_bn_reverse_fold"])
def test_a_compiled_training_step_is_the_plain_one(mode):
    """One graph; where a batch norm is live, its own float noise (1e-7) is all that differs."""
    results = []
    for compiled in (True, False):
        prepared = small()
        x = next(data())[0]
        torch._dynamo.reset()
        with qat_state(prepared, QatSettings(mode=mode)):
            model = torch.compile(prepared, backend="aot_eager", fullgraph=True) if compiled else prepared
            for _ in range(2):
                model(x).square().sum().backward()
        grads = [p.grad for p in prepared.parameters() if p.grad is not None]
        results.append([*grads, *prepared.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1e-3))
