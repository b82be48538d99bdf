"""Replay of single operators against full forward passes: the same outputs, whatever the model does."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support.models import revive
from support.replays import INF, Made, calibrated, full
from support.zoo import NAMES, build
from torch import nn

from qflow.analysis.measures.distances import Distances, disagreement
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.quant.model.prepare import prepare
from qflow.quant.replay.capture import ReplayError, capture
from qflow.quant.replay.replay import Replay, full_forward
from qflow.quant.replay.samples import axes_by_running
from qflow.quant.replay.widen import widen
from qflow.quant.trace.calling import batch_size, call_model, named_tensors


@pytest.mark.parametrize("memory", [INF, 10.0], ids=["all values kept", "values move along"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_replayed_quantizer_gives_what_a_full_forward_gives(name, memory):
    model, inputs = build(name)
    prepared = calibrated(model, inputs)
    variants = [row.variant for row in candidates(prepared)]
    captured = capture(model, prepared.plan, inputs, memory)
    assert captured.complete == (memory == INF)
    replay = Replay(model, prepared, captured)
    plain = dict(named_tensors(call_model(model, inputs)))
    assert disagreement(replay.replayed(), plain, plain, 1.0) < 1e-6
    wanted = full(prepared, inputs, variants)
    seen = set()
    for i, got in replay.run(variants):
        seen.add(i)
        for output, tensor in got.items():
            apart = {output: tensor}, {output: wanted[i][output]}, {output: plain[output]}
            assert disagreement(*apart, 1e-2) < 1e-3, (variants[i].name, output)
    assert seen == set(range(len(variants)))
    moved = [max(float((w[o] - plain[o]).abs().nan_to_num().max()) for o in w) for w in wanted]
    assert sum(m > 0 for m in moved) > 0.7 * len(moved)  # otherwise nothing was compared


HOLD_SIZES = ["vision_transformer", "detr", "bev", "point_pillars", "temporal"]


class CutsAtItsBatch(nn.Module):
    """Each of these gives what it was given up to the size at which it was captured, and no more."""

    def __init__(self, cut):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.cut = cut

    def forward(self, x):
        return self.c(torch.relu(self.b(self.cut(torch.relu(self.a(x)), x.shape[0]))))


CUTS = {
    "slice": lambda y, n: y[:n],
    "split": lambda y, n: y.split(n)[0],
    "narrow": lambda y, n: y.narrow(0, 0, n),
    "fixed": lambda y, n: y[:9],
}


@pytest.mark.parametrize("cut", CUTS)
@torch.no_grad()
def test_calls_that_cut_the_batch_are_run_one_variant_at_a_time(cut):
    """Only more variants than the capture had samples show it."""
    torch.manual_seed(0)
    model, x = CutsAtItsBatch(CUTS[cut]).eval(), torch.randn(4, 6)
    prepared = calibrated(model, x)
    found = sensitivity(model, prepared, [x])
    distances = Distances("L1", len(found.rows))
    distances.reference({"0": model(x)}, 4)
    by_name = {(row.node.name, row.sensitive_type): row.variant for row in candidates(prepared)}
    for i, row in enumerate(found.rows):
        distances.add(i, full_forward(prepared, x, by_name[row.op_name, row.sensitive_type]))
    assert [row.score for row in found.rows] == pytest.approx(
        [distances.result(i)[0] for i in range(len(found.rows))],
        rel=1e-3,  # last bits differ in a wide pass
    )
    one_by_one = any("one quantizer at a time" in finding.message for finding in found.findings)
    assert one_by_one == (cut in ("slice", "fixed"))  # the others hold an integer that captures show to grow


@pytest.mark.parametrize("way", ["running", "capture"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_several_variants_in_one_wide_batch_give_the_same(name, way, monkeypatch):
    """Whichever way it is found out how: calls that hold a batch size cannot simply be run at another."""
    if way == "capture":
        monkeypatch.setattr(
            "qflow.quant.replay.widen.axes_by_running", lambda *a: axes_by_running(*a) if a[4:] else 1 / 0
        )
    elif name not in HOLD_SIZES:
        monkeypatch.setattr("qflow.quant.replay.widen._by_capture", lambda *_: pytest.fail("the calls hold no size"))
    model, inputs = build(name)
    prepared = calibrated(model, inputs)
    variants = [row.variant for row in candidates(prepared)]
    captured = capture(model, prepared.plan, inputs, INF)
    widths = widen(model, prepared, Replay(model, prepared, captured).ops, inputs, captured, batch_size(inputs), 5)
    plain = dict(named_tensors(call_model(model, inputs)))
    wanted = full(prepared, inputs, variants)
    for i, got in Replay(model, prepared, captured, widths).run(variants):
        assert disagreement(got, wanted[i], plain) < 1e-3, variants[i].name


class SharedLinear(nn.Module):
    """One weight at two calls, once as a module and once as a functional."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.fc(torch.relu(self.fc(x)))))


@torch.no_grad()
def test_a_shared_weight_is_perturbed_at_all_its_calls():
    """Pitfall P22: a variant is a quantizer, not an operator."""
    torch.manual_seed(0)
    model, x = SharedLinear().eval(), torch.randn(4, 6)
    prepared = calibrated(model, x)
    variant = next(r.variant for r in candidates(prepared) if r.variant.weight and r.variant.name == "fc")
    captured = capture(model, prepared.plan, x, INF)
    replay = Replay(model, prepared, captured)
    assert len(replay.ops.of(variant)) == 2
    ((_, got),) = replay.run([variant])
    assert torch.allclose(got["0"], full_forward(prepared, x, variant)["0"], rtol=1e-5, atol=1e-6)


class Views(nn.Module):
    """Takes a feature map apart by its strides: what lies channels last cannot be viewed so."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 36, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.view(x.shape[0], -1)) + self.head(torch.as_strided(x, (x.shape[0], 288), (288, 1)))


@torch.no_grad()
def test_values_that_lie_channels_last_are_seen_as_the_model_sees_them():
    torch.manual_seed(0)
    model, x = Views().eval(), torch.randn(4, 3, 6, 6)
    prepared = calibrated(model, x)
    variants = [row.variant for row in candidates(prepared)]
    replay = Replay(model, prepared, capture(model, prepared.plan, x, INF))
    for i, got in replay.run(variants):
        assert torch.allclose(got["0"], full_forward(prepared, x, variants[i])["0"], rtol=1e-4, atol=1e-5)


class MixesRows(nn.Module):
    """A batch norm-like centring over the batch: samples are not independent."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x):
        x = torch.relu(self.fc(x))
        return x - x.mean(0, keepdim=True)


@torch.no_grad()
def test_a_model_that_mixes_its_samples_is_not_run_wide():
    torch.manual_seed(0)
    model, x = MixesRows().eval(), torch.randn(4, 5)
    prepared = calibrated(model, x)
    captured = capture(model, prepared.plan, x, INF)
    with pytest.raises(ReplayError, match="mean"):
        widen(model, prepared, Replay(model, prepared, captured).ops, x, captured, 4, 4)


@torch.no_grad()
def test_capturing_leaves_model_and_inputs_alone():
    model, inputs = build("resnet")
    before, given = copy.deepcopy(model.state_dict()), inputs.clone()
    prepared = calibrated(model, inputs)
    list(Replay(model, prepared, capture(model, prepared.plan, inputs, INF)).run([candidates(prepared)[0].variant]))
    assert torch.equal(inputs, given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@dataclasses.dataclass
class Hidden:
    state: torch.Tensor


class GivesObject(nn.Module):
    """A module that gives its result in an object, and one that takes it so."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 3)
        self.gives = Made(lambda m, x: Hidden(m.fc(x)), fc=nn.Linear(6, 6))
        self.takes = Made(lambda m, hidden: m.fc(hidden.state), fc=nn.Linear(6, 6))

    def forward(self, x):
        hidden = self.gives(self.before(x))
        return self.after(hidden.state + self.takes(hidden))


@torch.no_grad()
def test_a_skipped_module_may_give_an_object_but_not_take_one():
    torch.manual_seed(0)
    model, x = GivesObject().eval(), torch.randn(4, 6)
    prepared = calibrated(model, x, skip=["gives"])
    variants = [row.variant for row in candidates(prepared)]
    for i, got in Replay(model, prepared, capture(model, prepared.plan, x, INF)).run(variants):
        assert torch.allclose(got["0"], full_forward(prepared, x, variants[i])["0"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ReplayError, match="takes takes tensors inside an object"):
        capture(model, calibrated(model, x, skip=["gives", "takes"]).plan, x, INF)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


@torch.no_grad()
def test_a_functional_norm_is_folded_with_its_weight_alone_too():
    torch.manual_seed(0)
    model = revive(nn.Sequential(nn.Conv2d(3, 4, 3), OwnNorm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare(model, x, fold_functional_norms=True)
    assert prepared.plan.functional_norms
    plain = model(x)
    with prepared.only(weights=["0"]):
        prepared.weights["0"].retype(QDtype.qint16)
        prepared.weights["0"].set_scale(torch.full_like(prepared.weights["0"].scale, 1e-4))
        assert torch.allclose(prepared(x), plain, atol=1e-2)


class Encoder(nn.Module):
    """A transformer block with torch's fused attention, whose last bits differ from those of its parts."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)
        self.mlp = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48))

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def test_a_transformer_block_is_ranked_by_replay_which_equals_full_passes_bit_for_bit():
    torch.manual_seed(0)
    model = nn.Sequential(Encoder()).eval()
    x = torch.randn(16, 40, 48)  # more samples than are stacked
    prepared = calibrated(model, x)
    rows = candidates(prepared)
    table = sensitivity(model, prepared, [x], rows=rows)
    assert "replay" in table.method
    assert not [f for f in table.findings if "given up" in f.message]
    replay = Replay(model, prepared, capture(model, prepared.plan, x, INF))
    for i, got in replay.run([row.variant for row in rows]):
        wanted = full_forward(prepared, x, rows[i].variant, written_out=True)
        assert torch.equal(got["0"], wanted["0"]), rows[i].name
