"""What a qconfig asks for is done: requantized inputs, weight axes, observers, ranges, and what the device lowers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.setter import TemplateSetter
from qflow.core.settings import QatSettings
from qflow.quant.train.qat import train

INT16 = TemplateSetter(QDtype.qint16)


def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def calibrated(model, x, *setters, **options):
    prepared = qflow.prepare(model.eval(), x, setters, **options)
    qflow.calibrate(prepared, [x])
    return prepared


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Conv2d(8, 4, 1))


def named(**ops):
    return qflow.ModuleNameQconfigSetter({name.lstrip("_"): op for name, op in ops.items()})


def test_configuring_a_calibrated_model_leaves_no_quantizer_off():
    setter = named(_1="qint16", _2={"input": ["qint8"]})
    first = calibrated(chain(), image(), setter)
    second = calibrated(chain(), image())
    qflow.configure(second, (setter, qflow.HighPrecisionOutput(), TemplateSetter(QDtype.qint8)))
    assert all(q.enabled for q in second._keys().values())
    with torch.no_grad():
        assert torch.equal(first(image()), second(image()))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c, self.o = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.o(torch.sigmoid(self.c(torch.sigmoid(x))) + torch.tanh(self.c(torch.tanh(x) * 7.0)))


def test_all_calls_of_a_shared_module_requantize_and_the_scale_covers_them():
    prepared = calibrated(Shared(), image(), named(c={"input": ["qint8"]}), INT16)
    (quantizer,) = prepared.requants
    assert float(quantizer.scale) * 128 > 6.0  # the louder call decides, not the first
    read = []
    handle = quantizer.register_forward_hook(lambda module, args, out: read.append(len(out.unique())))
    with torch.no_grad():
        prepared(image())
    handle.remove()
    assert len(read) == 2
    assert max(read) <= 256
    again = qflow.prepare(Shared().eval(), image(), (named(c={"input": ["qint8"]}), INT16))
    again.load_state_dict(prepared.state_dict())
    assert len(again.requants) == 1
    with torch.no_grad():
        assert torch.equal(again(image()), prepared(image()))


def test_a_requantized_input_keeps_a_known_range():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1))
    prepared = calibrated(
        model, image(), qflow.ModuleNameQconfigSetter({"0": "qint16@0..200", "1": {"input": ["qint8"]}})
    )
    assert [float(q.scale) for q in prepared.requants] == pytest.approx([200 / 128])


class Merged(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.o, self.p = (
            nn.Conv2d(i, o, k) for i, o, k in ((3, 8, 3), (3, 8, 3), (8, 8, 1), (8, 2, 1))
        )

    def forward(self, x):
        y = F.silu(self.a(x))
        y[:, :4] = F.silu(self.b(x))[:, :4] * 100
        return self.p(F.silu(self.o(y)))


def test_a_requantized_input_covers_all_its_sources():
    prepared = calibrated(Merged(), image(), named(o={"output": "qint8", "input": ["qint8"]}), INT16)
    loud = float(prepared.outputs["[mul]"].scale) * 32768 / 1.25
    assert float(prepared.requants[0].scale) * 128 == pytest.approx(loud, rel=0.2)


@pytest.mark.parametrize(("axis", "shape"), [(-1, [1, 1, 1, 1]), (1, [1, 3, 1, 1]), (0, [8, 1, 1, 1])])
def test_the_weight_axis_is_delivered(axis, shape):
    prepared = calibrated(chain(), image(), qflow.ModuleNameQconfigSetter({"0": {"weight_axis": axis}}))
    scale, weight = prepared.weights["0"].scale, prepared.model[0].weight
    assert list(scale.shape) == shape
    others = [d for d in range(4) if d != axis]
    assert torch.allclose(scale.flatten(), weight.abs().amax(dim=others).flatten() / 128)
    with torch.no_grad():
        prepared(image())
    fresh = qflow.prepare(chain().eval(), image())
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(fresh.weights["0"].scale, scale)
    with pytest.raises(ConfigError, match="A weight axis is one of 0 to 3, or -1, but got 7"):
        qflow.prepare(chain().eval(), image(), qflow.ModuleNameQconfigSetter({"0": {"weight_axis": 7}}))


def test_an_observer_asked_for_by_name_holds_for_int16_and_a_templates_does_not():
    scales = {
        observer: float(
            calibrated(chain(), image(), named(_0={"output": "qint16", "observer": observer})).outputs["0"].scale
        )
        for observer in ("minmax", "percentile")
    }
    assert scales["percentile"] < 0.95 * scales["minmax"]
    template = calibrated(chain(), image(), qflow.calibration_8bit_weight_16bit_act_qconfig_setter)
    assert float(template.outputs["0"].scale) == pytest.approx(scales["minmax"])


def test_training_without_a_qconfig_keeps_what_the_prepared_model_pins():
    setters = qflow.ModuleNameQconfigSetter({"quant[input]": "qint8@-4..4"}), qflow.default_qat_fixed_act_qconfig_setter
    prepared = calibrated(chain(), image(), *setters)
    before = {name: float(q.scale) for name, q in prepared.outputs.items()}
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.0)
    batches = [(image() * 3, None)] * 20
    train(prepared, batches, lambda out, _: out.square().mean(), optimizer, settings=QatSettings(steps=20))
    assert {name: float(q.scale) for name, q in prepared.outputs.items()} == before


def test_a_key_of_a_functional_is_one_call():
    class Sums(nn.Module):
        def forward(self, x):
            return torch.sigmoid(torch.sigmoid(x) + x) + x

    prepared = qflow.prepare(Sums().eval(), image(), qflow.ModuleNameQconfigSetter({"[add]": "qint16"}))
    dtypes = {name: op.output for name, op in prepared.requested.ops.items()}
    assert (dtypes["[add]"], dtypes["[add](1)"]) == (QDtype.qint16, QDtype.qint8)


# ---- the graph


class Sum(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.c, self.d, self.o = form, nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = torch.tanh(self.d(x))
        if self.form == "alpha":
            return self.o(torch.add(y, self.c(x), alpha=-2))
        return self.o(self.c(x) + (y.mean((2, 3), keepdim=True) if self.form == "broadcast" else y))


@pytest.mark.parametrize(("form", "fuses"), [("plain", True), ("alpha", False), ("broadcast", False)])
def test_only_a_plain_sum_of_equal_shapes_fuses(form, fuses):
    graph = qflow.prepare(Sum(form).eval(), image()).graph
    assert ("Add" in graph.by_name["[add]"].fused_types) == fuses


class Functions(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.a, self.b = nn.Parameter(torch.randn(8, 3)), nn.Linear(3, 8), nn.Linear(3, 8)

    def forward(self, x):
        power = torch.pow(torch.sigmoid(self.a(x)), F.softplus(self.b(x)))
        product = torch.matmul(other=torch.sigmoid(power).t(), input=torch.tanh(power))
        return F.linear(weight=self.w, input=torch.sin(x)), product, 2**x


def test_keywords_and_exponents_keep_their_edges():
    x = torch.rand(4, 3) * 10
    prepared = qflow.prepare(Functions().eval(), x, qflow.ModuleNameQconfigSetter({"quant[x]": "qint16@0..10"}))
    by_name = prepared.graph.by_name
    assert by_name["[pow]"].inputs == ("[sigmoid]", "[softplus]")
    assert by_name["[matmul]"].inputs == ("[tanh]", "[t]")
    assert (by_name["[linear]"].inputs, by_name["[linear]"].weight) == (("[sin]",), "w")
    assert prepared.applied.ops["[rpow]"].known_range is None  # 2 ** x is not x ** 2


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.m, self.o = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        y, _ = self.m(x, x, x)
        y = y * 5
        z, _ = self.m(y, y, y)
        return self.o(z)


def test_multi_head_attention_gives_int8_and_its_calls_are_counted():
    x = torch.randn(2, 5, 8)
    prepared = qflow.prepare(Twice().eval(), x, INT16)
    assert prepared.graph.calls["m.out_proj"] == 2
    for name in ("m[linear](1)", "m[linear](3)"):
        op = prepared.applied.ops[name]
        assert (op.output, op.fallback) == (QDtype.qint8, "the output of nn.MultiheadAttention is int8 only")


# ---- findings


class Constants(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.gain, self.row = (
            nn.Conv2d(3, 8, 3),
            nn.Parameter(torch.tensor([3.3])),
            nn.Parameter(torch.ones(14)),
        )

    def forward(self, x):
        y = torch.sigmoid(self.a(x)) * self.gain
        y[:, 0, 0] = self.row
        return F.pad(y, (1, 1, 1, 1), value=-77.3) + torch.var_mean(y)[1]


def test_constants_without_a_quantizer_are_findings():
    messages = [f.message for f in qflow.check(qflow.prepare(Constants().eval(), image())).findings]
    for text in (
        "reads gain, one number",
        "setitem writes a constant",
        "pad brings in -77.3",
        "only the first is quant",
    ):
        assert any(text in message for message in messages), text


def test_calibration_shows_halves_and_accumulators_that_overflow_and_autocast():
    loud = chain()
    loud[0].weight.data *= 1e6
    found = {f.op: f.message for f in calibrated(loud, image(), named(_1="float16")).findings}
    assert "in float16, which ends at 65504" in found["1"]
    wide = nn.Sequential(nn.Flatten(), nn.Linear(8192, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.ones_(wide[1].weight)
    with torch.autocast("cpu"):
        prepared = calibrated(wide, torch.ones(2, 8192), INT16)
    messages = [f.message for f in prepared.findings]
    assert "4 channels can overflow the int32 accumulator if all qint16 inputs have their largest codes" in messages
    assert any(m.startswith("autocast is on") for m in messages)


def test_an_int16_weight_says_nothing_of_int16_inputs():
    prepared = qflow.prepare(chain().eval(), image(), named(_0="qint8/qint16"), march="nash-m-oe32")
    assert [f.message for f in qflow.check(prepared).findings if f.op == "0"] == ["qint16 weight!!!"]
