"""Models with norms and softmaxes: the values inside are int16 on the device, or halves in fp16."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.norms import INT8, INT16, Tokens, calibrated, error, inner_of, norms, unlike_tokens
from support.replays import Made
from torch import nn
from torch.utils.checkpoint import checkpoint

import qflow
from qflow.core.dtype import QDtype
from qflow.core.setter import ModuleNameSetter
from qflow.core.settings import QatSettings
from qflow.quant.model.shared_modules import split_graph
from qflow.quant.trace.compounds import written_out
from qflow.quant.train.qat import train
from qflow.quant.train.qat_state import qat_state


def test_a_layer_norm_loses_at_int16_what_it_loses_written_out():
    x = unlike_tokens()
    whole, apart = (error(calibrated(m, x, INT16), m, x) for m in (norms(), norms(True)))
    assert 0.3 < whole / apart < 3.0
    fp16 = error(calibrated(norms(), x, (ModuleNameSetter({"norm": "float16"}), INT16)), norms(), x)
    assert fp16 < 0.1 * whole


@torch.no_grad()
def test_a_device_without_the_rule_computes_in_float_inside(tmp_path):
    device = tmp_path / "exact.yaml"
    device.write_text("defaults: [nash-m, _self_]\nrules: {inner_int16: []}\n")
    x = unlike_tokens()
    exact = qflow.prepare(norms(), x, qconfig_setter=INT16, march=str(device))
    qflow.calibrate(exact, [x])
    found = [f for f in qflow.check(exact).findings if "float inside" in f.message]
    assert [f.op for f in found] == ["norm"]
    rounded = calibrated(norms(), x, INT16)
    assert not any("float inside" in f.message for f in qflow.check(rounded).findings)
    assert error(exact, norms(), x) < 0.1 * error(rounded, norms(), x)
    with rounded.only(outputs=[n for n in rounded.outputs if n not in inner_of(rounded)]):
        on_its_grid = rounded(x)
    with exact.only(outputs=[n for n in exact.outputs if n not in inner_of(exact)]):
        assert torch.equal(exact(x), on_its_grid)  # all other quantizers are the same


def test_the_check_lists_once_what_is_computed_in_float_inside():
    model = Made(
        lambda own, x: F.normalize(own.lrn(x), dim=1) + x.std(1, keepdim=True) + torch.logsumexp(x, 1, keepdim=True),
        lrn=nn.LocalResponseNorm(3),
    ).eval()
    prepared = calibrated(model, torch.randn(4, 6, 5))
    (found,) = (f for f in qflow.check(prepared).findings if "float inside" in f.message)
    names = {found.op, *found.message.partition("more: ")[2].rstrip(")").split(", ")}
    assert names == {"lrn", "[normalize]", "[std]", "[logsumexp]"}


@torch.no_grad()
def test_softmax_masks_leave_the_codes_to_the_scores():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 10, 10, generator=generator)
    mask = torch.ones(10, 10).triu(1).bool()
    for hidden in (-torch.inf, -1e4, -1e9):
        model = Made(lambda own, x, hidden=hidden: own.soft(x.masked_fill(mask, hidden)), soft=nn.Softmax(-1)).eval()
        prepared = calibrated(model, scores, INT16)
        with prepared.only(outputs=inner_of(prepared)):
            found = prepared(scores)
        assert (found - model(scores)).abs().max() < 1e-3
        assert float(found.masked_select(mask).max()) == 0.0


@torch.no_grad()
def test_attention_that_hides_whole_rows_gives_zeros_there():
    class Attention(nn.Module):
        def forward(self, q, keep):
            return F.scaled_dot_product_attention(q, q, q, attn_mask=keep)

    q, keep = torch.randn(2, 4, 8), torch.ones(2, 4, 4, dtype=torch.bool).tril()
    keep[:, 0] = False
    prepared = qflow.prepare(Attention().eval(), (q, keep), qconfig_setter=INT8)
    qflow.calibrate(prepared, [(q, keep)])
    assert len(inner_of(prepared)) == 4
    assert prepared(q, keep)[:, 0].abs().max() == 0.0
    assert torch.isfinite(prepared(q, keep)).all()


@torch.no_grad()
def test_calls_of_a_shared_norm_share_their_inner_scales():
    model = Made(lambda own, x: own.norm(own.norm(x) * 100.0) + own.norm(x), norm=nn.LayerNorm(12)).eval()
    torch.manual_seed(0)
    x = torch.randn(6, 5, 12) * 3.0
    prepared = calibrated(model, x)
    steps = ("var_mean.pre_mean", "var_mean.var", "rsqrt", "mul", "weight_mul")
    assert inner_of(prepared) == [f"norm.{step}" for step in steps]
    largest = prepared.stats.histograms["norm.var_mean.var"].largest
    assert largest == pytest.approx(float(x.var(-1, correction=0).max().clamp_min(1e4)), rel=1e-3)
    assert prepared(x).isfinite().all()


def test_calls_that_are_split_have_inner_scales_of_their_own():
    model = Made(lambda own, x: own.soft(x * 20.0) @ own.soft(x / 20.0), soft=nn.Softmax(-1)).eval()
    x = torch.randn(6, 12, 12)
    together = calibrated(model, x)
    apart = qflow.prepare(model, x, qconfig_setter=INT8, split_shared="auto")
    qflow.calibrate(apart, [x])
    steps = ("sub", "exp", "sum", "reciprocal")
    assert inner_of(together) == [f"soft.{step}" for step in steps]
    assert inner_of(apart) == [f"{call}.{step}" for call in ("soft", "soft(1)") for step in steps]
    assert [n.inner for n in split_graph(together.graph, ["soft"]).nodes] == [n.inner for n in apart.graph.nodes]
    first, second = (float(apart.outputs[f"{call}.sub"].scale) for call in ("soft", "soft(1)"))
    assert first > 10 * second
    by_call = together.stats.calls["soft.sub"]
    assert [by_call[f"{call}.sub"].largest * 1.25 / 32768 for call in ("soft", "soft(1)")] == [
        pytest.approx(first),
        pytest.approx(second),
    ]
    messages = [f.message for f in qflow.check(together).findings if f.op.startswith("soft.")]
    assert not messages  # cases B and C are those of the module


@torch.no_grad()
def test_an_inner_value_that_was_always_zero_stays_float_and_is_reported():
    model = Made(lambda own, x: own.norm(x - x), norm=nn.LayerNorm(12)).eval()
    prepared = calibrated(model, torch.randn(4, 12))
    text = "norm.var_mean.var was always zero on the calibration data: left unquantized"
    assert text in prepared.silent
    assert torch.equal(prepared(torch.randn(4, 12)), torch.zeros(4, 12))


def test_in_fp16_the_inner_values_are_halves_and_their_overflow_is_counted():
    x = unlike_tokens() * 300.0
    prepared = calibrated(norms(), x, (ModuleNameSetter({"norm": "float16"}), INT8))
    assert {prepared.outputs[name].dtype for name in inner_of(prepared)} == {QDtype.float16}
    with torch.no_grad():
        prepared(x)
    assert "norm.var_mean.var" in prepared.overflowed


@torch.no_grad()
def test_a_saved_state_holds_the_inner_scales():
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(4, 6, 8)
    prepared = calibrated(model, x, INT16)
    fresh = qflow.prepare(model, x, qconfig_setter=INT8)
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh(x), prepared(x))
    assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))


def test_training_moves_the_inner_scales_and_lowers_the_loss():
    torch.manual_seed(0)
    x, model = torch.randn(64, 16) * torch.exp(torch.randn(64, 1) / 2), norms()
    prepared = calibrated(model, x, INT8)
    before = {name: float(prepared.outputs[name].scale) for name in inner_of(prepared)}
    target = model(x).detach()

    def loss(out, batch):
        return F.mse_loss(out, target)

    optimizer = torch.optim.Adam(prepared.model.parameters(), lr=1e-2)
    settings = QatSettings(steps=20, averaging_constant=0.1)
    report = train(prepared, [(x * 2.0, None)] * 5, loss, optimizer, settings=settings)
    after = {name: float(prepared.outputs[name].scale) for name in inner_of(prepared)}
    assert after["norm.var_mean.var"] > 2.0 * before["norm.var_mean.var"]
    assert report.losses[-1] < report.losses[0]


def test_autocast_computes_in_float32_inside():
    x = unlike_tokens()
    prepared = calibrated(norms(), x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = prepared.model.first(x)
        assert y.dtype == torch.bfloat16
        result = written_out(norms().norm, (y,), {}).run(lambda name, value: value)
    assert result.dtype == torch.float32


def test_activation_checkpointing_recomputes_with_the_same_inner_scales():
    class Checkpointed(nn.Module):
        def __init__(self, again):
            super().__init__()
            self.first, self.norm, self.again = nn.Linear(16, 64), nn.LayerNorm(64), again

        def forward(self, x):
            y = self.first(x)
            return checkpoint(self.norm, y, use_reentrant=False) if self.again else self.norm(y)

    torch.manual_seed(0)
    x, found = torch.randn(32, 16), []
    for again in (False, True):
        torch.manual_seed(1)
        prepared = calibrated(Checkpointed(again).eval(), x, INT16)
        with qat_state(prepared, QatSettings(averaging_constant=0.5)):
            prepared(x * 3.0).square().sum().backward()
        found.append([p.grad for p in prepared.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(4, 6, 8)
    prepared = calibrated(model, x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(prepared, backend="eager", fullgraph=True)(x), prepared(x))
