"""F.batch_norm on the statistics of a module: apart, as in the plugin, with a way out that works; or folded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.settings import SensitivitySettings
from qflow.quant.model.prepare import prepare
from qflow.quant.model.weighted import set_norm_mode

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Written(nn.BatchNorm2d):
    def forward(self, x):
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return F.relu(x)


class Inherited(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Frozen(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        return F.relu(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps))


class Plain(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.BatchNorm2d(channels), nn.ReLU())


class Outside(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        norm = self.norm
        return F.relu(F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps))


def net(kind):
    """Two blocks with the same weights and statistics, whatever `kind` is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 4, 3, bias=False), kind(4), nn.Conv2d(4, 2, 1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in [m for m in model.modules() if hasattr(m, "running_mean")]:
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name).uniform_(0.2, 2.0, generator=generator)
    return model.eval()


def error(prepared, model):
    qflow.calibrate(prepared, [IMAGES])
    with torch.no_grad():
        return float((prepared(IMAGES) - model(IMAGES)).norm() / model(IMAGES).norm())


@pytest.mark.parametrize("kind", [Written, Inherited, Frozen])
def test_it_stays_apart_and_the_finding_says_how_to_split_it(kind):
    graph = prepare(net(kind), IMAGES).graph
    reasons = dict([(first, why) for first, _, why in graph.unfused])
    assert set(reasons) == {"0", "2"}
    assert reasons["0"].startswith(
        f"the F.batch_norm inside {kind.__name__} is no module to the plugin: split it into an "
        "nn.BatchNorm2d that loads its state dict"
    )
    assert not graph.notes


@pytest.mark.parametrize("kind", [Written, Inherited, Frozen])
def test_the_way_out_works(kind):
    model, split = net(kind), net(kind)
    for at in ("1", "3"):
        plain = Plain(4)
        plain[0].load_state_dict(split.get_submodule(at).state_dict(), strict=kind is not Frozen)
        split.set_submodule(at, plain)
    split.eval()
    graph = prepare(split, IMAGES).graph
    assert not graph.unfused
    assert graph.by_name["0"].fused_types == ("BN", "ReLU")
    assert torch.allclose(split(IMAGES), model(IMAGES), atol=1e-6)


def test_statistics_of_a_batch_norm_that_is_not_called_itself():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Outside(4)).eval()
    (found,) = prepare(model, IMAGES).graph.unfused
    assert "call 1.norm(x) itself" in found[2]
    assert prepare(model, IMAGES, fold_functional_norms=True).graph.by_name["0"].fused_types == ("BN", "ReLU")


@pytest.mark.parametrize("kind", [Written, Inherited, Frozen, Outside])
def test_folded_on_request_it_computes_as_the_split_model(kind):
    model, split = net(kind), net(Plain)
    folded, plain = qflow.prepare(model, IMAGES, fold_functional_norms=True), qflow.prepare(split, IMAGES)
    (note,) = folded.graph.notes
    assert "and 1 more because of fold_functional_norms" in note
    assert [n.fused_types for n in folded.graph.nodes] == [n.fused_types for n in plain.graph.nodes]
    assert error(folded, model) == error(plain, split)
    assert qflow.cost(folded).latency_ms == qflow.cost(plain).latency_ms
    assert torch.equal(copy.deepcopy(folded)(IMAGES), plain(IMAGES))


@pytest.mark.parametrize("mode", ["fuse_bn", "with_bn", "with_bn_reverse_fold"])
def test_folded_on_request_it_trains_as_the_split_model(mode):
    gradients = []
    for kind in (Written, Plain):
        prepared = qflow.prepare(net(kind), IMAGES, fold_functional_norms=True)
        qflow.calibrate(prepared, [IMAGES])
        set_norm_mode(prepared.model, mode)
        prepared.train()
        prepared(IMAGES).square().mean().backward()
        kept = [p for p in prepared.model.parameters() if p.requires_grad]
        gradients.append(([p.grad for p in kept], [b for b in prepared.model.buffers() if b.is_floating_point()]))
    for written, plain in zip(*gradients, strict=True):
        assert len(written) == len(plain)
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(written, plain, strict=True))


@pytest.mark.parametrize("method", ["exact", "estimate"])
def test_folded_on_request_its_sensitivities_are_those_of_the_split_model(method):
    tables = []
    for kind in (Written, Plain):
        model = net(kind)
        prepared = qflow.prepare(model, IMAGES, fold_functional_norms=True)
        qflow.calibrate(prepared, [IMAGES])
        rows = sensitivity(model, prepared, [IMAGES], settings=SensitivitySettings(method=method)).rows
        tables.append([(row.op_name, row.sensitive_type, pytest.approx(row.score, rel=1e-4)) for row in rows])
    assert tables[0] == [(name, kind, score.expected) for name, kind, score in tables[1]]
