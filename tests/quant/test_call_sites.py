"""Names hold where an operator runs only in training, only once, or only at one resolution."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import qflow
from qflow.core.errors import ModelError
from qflow.core.settings import QatSettings
from qflow.quant.trace.sites import call_site
from qflow.quant.trace.trace import trace
from qflow.quant.train.qat import train
from qflow.quant.train.qat_state import qat_state


def image(size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def calibrated(model, *data, setters=()):
    torch.manual_seed(0)
    prepared = qflow.prepare(model.eval(), data[0], setters)
    qflow.calibrate(prepared, data)
    return prepared


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)


class DropPath(Conv):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8, 1, 1) * 5)

    def forward(self, x):
        y = F.silu(self.conv(x)) * 10.0
        if self.training:
            y = y * (torch.rand(y.shape[0], 1, 1, 1) < 0.9).float().div(0.9)
        return self.out(torch.sigmoid(y) * self.gain)


def test_an_operator_of_training_alone_shifts_no_names():
    prepared = calibrated(DropPath(), image())
    before = qflow.scales(prepared)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.0)
    batches, settings = [(image(), None)] * 200, QatSettings(steps=200)
    report = train(prepared, batches, lambda out, _: out.square().mean(), optimizer, settings=settings)
    after = qflow.scales(prepared)
    for name in ("[mul]", "[mul](1)", "const[gain]", "[sigmoid]"):
        assert after[name] == pytest.approx(before[name], rel=0.2)  # shifted, [mul](1) would be 4 times as large
    assert "test_call_sites.py" in report.findings[0]
    assert "[div] at" in report.findings[0]


class Resized(Conv):
    def forward(self, x):
        y = self.conv(x)
        if x.shape[-1] > 16:
            y = F.avg_pool2d(y, 2) * 0.01
        return self.out(torch.sigmoid(y) * 4.0 + F.silu(y) * 50.0)


def test_a_branch_on_the_resolution_shifts_no_names_and_is_reported_once():
    prepared = calibrated(Resized(), image())
    prepared.watch = lambda name, value: seen.setdefault(name, float(value.abs().max()))
    seen = {}
    with torch.no_grad(), pytest.warns(UserWarning, match="stay float, .*test_call_sites.py"):
        prepared(image(32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(image(32))
    assert seen["[mul]"] <= 4.0
    assert seen["[mul]"] > 1.0
    unseen = [name for name in seen if " at test_call_sites.py:" in name]
    assert (
        {name.partition(" ")[0] for name in unseen}
        == {"[avg_pool2d]", "[mul]"}
        == {name.partition(" ")[0] for name in prepared.unseen}
    )
    assert any("not while the model was traced" in f.message for f in qflow.check(prepared).findings)


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.out = nn.Conv2d(3, 3, 3, padding=1), nn.SiLU(), nn.Conv2d(3, 2, 1)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        while x.shape[-1] > 4:
            x = self.pool(self.act(self.conv(x)))
        return self.out(x)


def test_a_module_called_more_often_than_traced_keeps_its_quantizer():
    prepared = calibrated(Loop(), image())
    with prepared.quantized(), torch.no_grad():
        prepared(image(32))
        assert not prepared.unseen
    seen = []
    quantizer = prepared.outputs["conv"]
    handle = quantizer.register_forward_hook(lambda *_: seen.append(1))
    prepared(image(32))
    handle.remove()
    assert len(seen) == 3


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)
        self.norm.running_mean.fill_(3.0)

    def forward(self, x):
        y = self.conv(x)
        return self.out(F.relu(self.norm(y) if x.shape[-1] >= 16 else y))


def test_a_folded_norm_that_is_left_out_is_an_error():
    prepared = calibrated(Branch(), image())
    with pytest.raises(ModelError, match="runs after it, but got norm left out"):
        prepared(image(8))


class Cached(Conv):
    def __init__(self):
        super().__init__()
        self.grid = None

    def forward(self, x):
        if self.grid is None:
            self.grid = torch.arange(x.shape[-1]) * 0.5
        return self.out(F.silu(self.conv(x)) * 2.0 + self.grid)


def test_names_are_the_same_whether_a_cache_is_filled_or_not():
    warm = Cached().eval()
    warm(image())
    names = [set(qflow.prepare(model, image()).outputs) for model in (Cached().eval(), warm)]
    assert "[mul]" in names[0]
    assert names[0] == names[1]


class ByType(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * 2 if type(layer) is nn.Conv2d else layer(x)
        return x


def test_asking_for_the_exact_type_is_refused_with_the_way_out():
    with pytest.raises(ModelError, match=r"ask isinstance\(m, nn.Conv2d\)"):
        qflow.prepare(ByType().eval(), image())


def test_a_model_of_torchs_own_modules_has_the_same_names_wherever_it_is_called_from():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    prepared = calibrated(nn.Sequential(nn.Linear(4, 8), layer), torch.randn(2, 5, 4))

    def elsewhere():
        return prepared(torch.randn(2, 5, 4))

    with prepared.quantized(), torch.no_grad():
        elsewhere()
        assert not prepared.unseen
        assert {q.name for q in prepared._keys().values() if q.active} <= prepared.ran


def test_a_call_site_is_a_line_of_a_function():
    here = [call_site(), call_site()]
    assert here[0] == here[1] != call_site()
    assert here[0][1] == 1


class Checkpointed(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.lin, self.out = checkpointed, nn.Linear(4, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def part(self, y):
        if self.training:
            y = y * 0.9 + 0.01
        return torch.sigmoid(y) * 3.0

    def forward(self, x):
        y = self.lin(x) * 1.5
        for part in (self.layer, self.part, self.part):
            y = checkpoint(part, y, use_reentrant=False) if self.checkpointed else part(y)
        return self.out(y)


def test_a_recomputation_finds_the_names_of_its_pass():
    """It runs below the frames of the backward pass, and what is all torch's has no line of its own there."""
    x, gradients = torch.randn(2, 5, 4), []
    for checkpointed in (False, True):
        prepared = calibrated(Checkpointed(checkpointed), x)
        with qat_state(prepared, QatSettings()):
            prepared(x).square().sum().backward()
        gradients.append({n: p.grad for n, p in prepared.model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_forward_that_the_user_put_on_a_leaf_is_still_there_after_tracing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    plain = model[0].forward
    model[0].forward = lambda x: 2.0 * plain(x)
    own = model[0].forward
    trace(model, torch.randn(2, 3, 4, 4))
    assert model[0].forward is own
    assert "forward" not in model[1].__dict__


class Memory(nn.Module):
    """Attends to features of its own, or where `own` is set to the queries themselves: torch then packs the three."""

    def __init__(self):
        super().__init__()
        self.attention, self.other, self.own = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8), False

    def forward(self, x):
        memory = x if self.own else self.other(x)
        return self.attention(x, memory, memory, need_weights=False)[0]


def test_parts_of_attention_that_run_only_in_some_calls_shift_no_names():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    prepared = calibrated(Memory(), x)
    before = qflow.scales(prepared)
    prepared.model.own = True
    with pytest.warns(UserWarning, match=r"attention\[linear\].* first"):
        prepared(x)
    assert {name.partition(" at ")[0] for name in prepared.unseen} >= {"attention[linear]"}
    assert "attention.out_proj.weight" in prepared.ran
    assert not any("in_proj" in name for name in prepared.ran)
    assert qflow.scales(prepared) == before
