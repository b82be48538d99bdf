"""Values inside norms and softmaxes: int16 on the device whatever the operator's qconfig, float16 in fp16."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.replays import Made, full
from torch import nn

import qflow
from qflow.analysis.advice.advisor import advise
from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.measures.distances import disagreement
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.setter import ModuleNameSetter
from qflow.core.settings import QatSettings, SensitivitySettings
from qflow.quant.replay.capture import capture
from qflow.quant.replay.replay import Replay
from qflow.quant.replay.widen import widen
from qflow.quant.trace.compounds import written_out
from qflow.quant.train.qat import train

INT8, INT16 = qflow.TemplateSetter("qint8"), qflow.TemplateSetter("qint16")


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


def calibrated(model, x, setter=INT8):
    prepared = qflow.prepare(model, x, qconfig_setter=setter)
    qflow.calibrate(prepared, [x])
    return prepared


def inner_of(prepared):
    return [name for node in prepared.graph.quantized for name in node.inner]


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


class Norms(nn.Module):
    def __init__(self, written_out=False):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 4)
        self.written_out = written_out

    def forward(self, x):
        y = self.first(x)
        if not self.written_out:
            return self.head(self.norm(y))
        d = y - y.mean(-1, keepdim=True)
        y = d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5)
        return self.head(y * self.norm.weight + self.norm.bias)


def norms(written_out=False):
    torch.manual_seed(1)
    return Norms(written_out).eval()


def unlike_tokens(count=256):
    torch.manual_seed(0)
    return torch.randn(count, 16) * torch.exp(torch.randn(count, 1) * 2)


def error(prepared, model, x):
    with torch.no_grad():
        return float((prepared(x) - model(x)).norm() / model(x).norm())


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
    assert len(inner_of(prepared)) == len(SOFTMAX)
    assert prepared(q, keep)[:, 0].abs().max() == 0.0
    assert torch.isfinite(prepared(q, keep)).all()


@torch.no_grad()
def test_calls_of_a_shared_norm_share_their_inner_scales():
    model = Made(lambda own, x: own.norm(own.norm(x) * 100.0) + own.norm(x), norm=nn.LayerNorm(12)).eval()
    x = tokens(6, 5, 12, dtype=torch.float32)
    prepared = calibrated(model, x)
    assert inner_of(prepared) == [f"norm.{step}" for step in (*NORM, "mul", "weight_mul")]
    largest = prepared.stats.histograms["norm.var_mean.var"].largest
    assert largest == pytest.approx(float(x.var(-1, correction=0).max().clamp_min(1e4)), rel=1e-3)
    assert prepared(x).isfinite().all()


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


# ---- names, tables, replay


def test_a_name_inside_a_norm_sets_the_whole_norm():
    x = unlike_tokens()
    for setter in (ModuleNameSetter, qflow.ModuleNameQconfigSetter):
        prepared = calibrated(norms(), x, (setter({"norm.var_mean.pre_mean": "qint16"}), INT8))
        assert prepared.applied.ops["norm"].output == QDtype.qint16
    with pytest.raises(ConfigError, match="head.weight"):
        calibrated(norms(), x, (ModuleNameSetter({"head.weight": "qint16"}), INT8))
    table = [["norm.weight_mul", "activation", "", 1.0, "qint8"], ["head", "activation", "", 0.5, "qint8"]]
    setter = qflow.sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(table, topk=1)
    prepared = calibrated(norms(), x, (setter, INT8))
    assert prepared.applied.ops["norm"].output == QDtype.qint16
    assert prepared.applied.ops["head"].output == QDtype.qint8


@torch.no_grad()
def test_inner_values_have_rows_of_their_own_that_no_ratio_promotes():
    x, model = unlike_tokens(), norms()
    prepared = calibrated(model, x)
    table = sensitivity(model, prepared, [x[:16]])
    assert not table.findings
    rows = {r.op_name: r for r in table.rows if r.sensitive_type == "activation"}
    assert {rows[name].quant_dtype for name in inner_of(prepared)} == {"qint16"}
    assert rows["norm.var_mean.var"].op_type == rows["norm"].op_type
    assert rows["norm.var_mean.var"].score > rows["norm"].score > 0.0
    estimate = sensitivity(model, prepared, [x[:16]], settings=SensitivitySettings(method="estimate", draws=256))
    guessed = {r.op_name: r.score for r in estimate.rows if r.sensitive_type == "activation"}
    assert guessed["norm.mul"] == pytest.approx(rows["norm.mul"].score, rel=0.5)
    assert not set(table.activation_scores()) & set(inner_of(prepared))
    whole = qflow.sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter(table, ratio=1.0)
    promoted = calibrated(model, x, (whole, INT8)).applied
    assert set(promoted.names(QDtype.qint16)) == {"quant[x]", "first", "norm", "head"}


class Tokens(nn.Module):
    """Norms as modules, shared and as a function, attention, and a log-softmax."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.rms = nn.Linear(8, 16), nn.LayerNorm(16), nn.RMSNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        y = self.norm(self.first(x))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.rms(self.norm(y)) + F.layer_norm(y, (16,))
        return F.log_softmax(self.head(y), -1)


@pytest.mark.parametrize("wide", [False, True])
@torch.no_grad()
def test_a_replayed_inner_quantizer_gives_what_a_full_forward_gives(wide):
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(4, 6, 8) * torch.exp(torch.randn(4, 6, 1))
    prepared = calibrated(model, x)
    variants = [row.variant for row in candidates(prepared)]
    assert sum(row.inside for row in candidates(prepared)) == len(inner_of(prepared)) == 5 + 4 + 3 + 3 + 4
    captured = capture(model, prepared.plan, x, float("inf"))
    replay = Replay(model, prepared, captured)
    if wide:
        replay.widths = widen(model, prepared, replay.ops, x, captured, 4, 7)
    plain, wanted = {"out": model(x)}, full(prepared, x, variants)
    for i, got in replay.run(variants):
        (name,) = got
        assert disagreement({"out": got[name]}, {"out": wanted[i][name]}, plain, 1e-2) < 1e-3, variants[i].name


@torch.no_grad()
def test_the_layer_table_shows_the_error_of_inner_values_at_the_row_of_the_norm():
    x, model = unlike_tokens(), norms()
    prepared = calibrated(model, x, INT16)
    rows = {r.mod_name: r for r in compare_layers(model, prepared, x).rows}
    y = model.first(x)
    with prepared.only(outputs=["norm", *inner_of(prepared)]):
        alone = prepared.model.norm  # called outside a forward pass it is the float module
        assert torch.equal(alone(y), model.norm(y))
    assert rows["norm"].single_error > 20 * rows["first"].single_error
    for name in inner_of(prepared):
        prepared.outputs[name].dtype = None
    assert compare_layers(model, prepared, x).rows[2].single_error < 0.05 * rows["norm"].single_error


def test_the_advice_for_coarse_inner_values_is_fp16_if_that_was_measured():
    x, model = unlike_tokens(), norms()
    prepared = calibrated(model, x, INT16)
    own, fp16 = candidates(prepared), candidates(prepared, QDtype.float16)
    for known, spec, text in (([*own, *fp16], "float16", "at fp16 they lose"), (own, "", "may help")):
        table = sensitivity(model, prepared, [x[:16]], rows=known)
        found = advise(prepared, prepared.stats, table, None, lambda name, spec: "")
        advice = next(a for a in found if a.cause == "values inside")
        assert (advice.op, advice.spec) == ("norm", spec)
        assert "qint16 whatever its dtype, and norm.var_mean.var is too coarse" in advice.text
        assert text in advice.text


# ---- state and training


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
