"""Modules that are called several times: what one quantizer for all calls costs, and a quantizer for each call."""

import copy

import pytest
import torch
from support.models import Shared, revive
from support.yolo import Conv, Detector, own_activations
from torch import nn

import qflow
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.errors import ModelError
from qflow.core.settings import QatSettings, SensitivitySettings
from qflow.quant.model.prepare import prepare
from qflow.quant.model.shared_modules import own_modules
from qflow.quant.train.qat import train

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
INT16 = qflow.TemplateSetter(qflow.QDtype.qint16)


def detector():
    torch.manual_seed(0)
    return revive(Detector())


def calibrated(model, images=IMAGES, **options):
    prepared = qflow.prepare(model, images, **options)
    qflow.calibrate(prepared, [images])
    return prepared


def findings(prepared):
    return {(f.op, f.level): f.message for f in qflow.check(prepared).findings}


def calls_of_the_activation(graph):
    return [node for node in graph.nodes if node.op_type.endswith("SiLU")]


def test_one_call_that_stays_int8_keeps_all_calls_of_a_shared_activation_at_int8():
    shared, apart = (calibrated(detector(), qconfig_setter=INT16, split_shared=s) for s in ("report", "auto"))
    assert shared.applied.ops["stem.act"].output == qflow.QDtype.qint8
    calls = calls_of_the_activation(apart.graph)
    assert [n.name for n in calls] == ["stem.act", *(f"stem.act({k})" for k in range(1, 18))]
    lowered = [n.name for n in calls if apart.applied.ops[n.name].output == qflow.QDtype.qint8]
    assert [apart.applied.ops[name].fallback for name in lowered] == [
        "sppf.m (max_pool) takes int8 input only",
        "up (resize) takes int8 input only",
    ]


def test_the_check_says_once_what_splitting_reaches_and_how_to_write_it():
    found = [f for f in qflow.check(qflow.prepare(detector(), IMAGES)).findings if "shared module" in f.message]
    assert [(f.op, f.level) for f in found] == [("stem.act", "check")]
    assert found[0].message == (
        "shared module: one SiLU is called 18 times and has one dtype. Under all-int16 79% of the MACs and 40% of the "
        "operators stay int8, if its calls are split 7% and 6%: quant.split_shared=auto tries it. In the float model "
        "write self.act = copy.deepcopy(self.act) at the end of Conv.__init__"
    )
    again = qflow.check(qflow.prepare(detector(), IMAGES, split_shared="auto")).findings
    assert [f.op for f in again if "has a quantizer because of quant.split_shared" in f.message] == ["stem.act"]
    assert not [f for f in again if "shared module" in f.message]
    mended = qflow.check(qflow.prepare(own_activations(detector()), IMAGES)).findings
    assert not [f for f in mended if "shared" in f.message]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("template", [qflow.QDtype.qint8, qflow.QDtype.qint16])
def test_split_calls_compute_what_the_mended_float_model_computes(inplace, template):
    model = detector()
    model.stem.act = copy.deepcopy(model.stem.act)
    for module in model.modules():
        if isinstance(module, Conv):
            module.act = model.stem.act
    model.stem.act.inplace = inplace
    setter = qflow.TemplateSetter(template)
    apart = calibrated(model, qconfig_setter=setter, split_shared="auto")
    mended = calibrated(own_activations(model), qconfig_setter=setter)
    pairs = [*zip(calls_of_the_activation(apart.graph), calls_of_the_activation(mended.graph), strict=True)]
    assert len(pairs) == 18
    for one, other in pairs:
        assert torch.equal(apart.outputs[one.quantizer].scale, mended.outputs[other.quantizer].scale)
    assert [n.fused_types for n in apart.graph.nodes] == [n.fused_types for n in mended.graph.nodes]
    with torch.no_grad():
        got, wanted, plain = apart(IMAGES), mended(IMAGES), model(IMAGES)
        qflow.set_fake_quantize(apart, qflow.FakeQuantState.FLOAT)
        for name in plain:
            assert torch.equal(got[name], wanted[name])
            assert torch.equal(apart(IMAGES)[name], plain[name])  # the float graph is the model's, bit for bit
    assert qflow.cost(apart).latency_ms == qflow.cost(mended).latency_ms


def test_a_name_of_a_split_call_sets_it_alone():
    setter = qflow.ModuleNameQconfigSetter({"stem.act": "qint16", "stem.act(3)": "qint16"})
    ops = qflow.prepare(detector(), IMAGES, setter, split_shared="auto").requested.ops
    assert [n for n in ops if ops[n].output == qflow.QDtype.qint16] == ["stem.act", "stem.act(3)"]
    ops = qflow.prepare(detector(), IMAGES, setter, split_shared=[nn.SiLU]).applied.ops
    assert ops["stem.act(1)"].output == qflow.QDtype.qint8 == ops["stem.act(2)"].output


def test_a_split_model_is_saved_and_loaded_and_fits_no_other_split():
    setter = qflow.ModuleNameQconfigSetter({"stem.act(3)": "qint16"})
    saved = calibrated(detector(), qconfig_setter=setter, split_shared="auto")
    loaded = qflow.prepare(detector(), IMAGES, split_shared="auto")
    loaded.load_state_dict(saved.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES)["fine"], saved(IMAGES)["fine"])
    assert loaded.applied.ops["stem.act(3)"].output == qflow.QDtype.qint16
    with pytest.raises(ModelError, match=r"another quantizer at stem\.act\(1\)\. .*the same split_shared"):
        qflow.prepare(detector(), IMAGES).load_state_dict(saved.state_dict(), strict=False)


def test_sensitivities_are_ranked_by_call_and_scales_are_trained_by_call():
    model = detector()
    prepared = calibrated(model, split_shared="auto")
    rows = sensitivity(model, prepared, [IMAGES], settings=SensitivitySettings(method="exact")).rows
    own = [row for row in rows if row.op_name.startswith("stem.act") and row.sensitive_type == "activation"]
    assert len(own) == 18
    assert len({row.score for row in own}) == 18
    before = {name: float(q.scale) for name, q in prepared.outputs.items() if name.startswith("stem.act")}

    def loss(outputs, target):
        return outputs["fine"].square().mean() + outputs["coarse"].square().mean()

    optimizer = torch.optim.SGD(prepared.model.parameters(), lr=1e-3)
    train(prepared, [(IMAGES * 2.0, None)] * 2, loss, optimizer, settings=QatSettings(steps=2))
    ratios = {name: float(prepared.outputs[name].scale) / scale for name, scale in before.items()}
    assert len(ratios) == 18
    assert all(ratio != 1.0 for ratio in ratios.values())
    assert len({round(ratio, 4) for ratio in ratios.values()}) > 3


class Twice(nn.Module):
    """Case B or C of the guide: one convolution reads the image, and the image times `factor`."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu, self.factor = nn.Conv2d(3, 3, 1), nn.ReLU(), factor

    def forward(self, x):
        return self.relu(self.conv(x)), self.relu(self.conv(x * self.factor))


def test_calls_of_similar_values_are_harmless_and_calls_of_unlike_values_are_mended_by_name():
    images = IMAGES[:, :, :8, :8]
    assert "case B" in findings(calibrated(Twice(1.1).eval(), images))["conv", "info"]
    model = Twice(50.0).eval()
    shared = calibrated(model, images)
    text = findings(shared)["conv", "check"]
    assert "under one scale (factor " in text
    assert "quant.split_shared=[conv] tries it; in the float model write self.conv_1 = copy.deepcopy(self.conv)" in text
    assert "relu" in calibrated(model, images, split_shared="auto").graph.by_name  # a weight is split by name only
    apart = calibrated(model, images, split_shared="conv")
    assert [(n.name, n.quantizer, n.weight, n.fused) for n in apart.graph.quantized if n.weight] == [
        ("conv", "conv", "conv", ("relu",)),
        ("conv(1)", "conv(1)", "conv", ("relu(1)",)),
    ]
    assert ("conv", "info") not in findings(apart)

    def small_half_off(prepared):
        with torch.no_grad():
            return float((prepared(images)[0] - model(images)[0]).norm())

    assert small_half_off(apart) < small_half_off(shared) / 5


def test_split_calls_of_a_convolution_quantize_its_one_weight_alike():
    setter = qflow.ModuleNameQconfigSetter({"conv(1)": "qint8/qint16"})
    prepared = qflow.prepare(Twice(50.0).eval(), IMAGES, setter, split_shared="conv")
    assert prepared.applied.ops["conv(1)"].weight == qflow.QDtype.qint8
    assert prepared.applied.ops["conv(1)"].fallback == "its weight is that of conv: qint8"
    texts = [f.message for f in qflow.check(prepared).findings if f.op == "conv(1)"]
    assert "qint8: its weight is that of conv: qint8" in texts
    both = qflow.ModuleNameQconfigSetter({"conv": "qint8/qint16"})
    ops = qflow.prepare(Twice(50.0).eval(), IMAGES, both, split_shared="conv").applied.ops
    assert ops["conv(1)"].weight == ops["conv"].weight == qflow.QDtype.qint16


def test_the_norm_behind_a_split_convolution_stays_apart_because_the_weight_is_one():
    model, x = revive(Shared()), torch.randn(2, 4, 8, 8)
    prepared = qflow.prepare(model, x, split_shared=["conv", "bn"])
    assert {"conv", "conv(1)", "bn", "bn(1)"} <= set(prepared.outputs)
    assert ("conv", "bn", "conv is a shared module") in prepared.graph.unfused
    qflow.calibrate(prepared, [x])
    assert torch.isfinite(prepared(x)).all()
    assert [n.name for n in prepared.graph.weighted] == ["conv"]


class Head(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.SiLU())


class Levels(nn.Module):
    """One head on two levels, as in RetinaNet."""

    def __init__(self):
        super().__init__()
        self.head = Head()

    def forward(self, x):
        return self.head(x), self.head(x[:, :, ::2, ::2] * 30.0)


def test_the_name_of_a_head_splits_the_modules_in_it_at_any_place_of_the_object():
    prepared = prepare(Levels().eval(), IMAGES, split_shared="head")
    assert {"head.0", "head.0(1)", "head.1", "head.1(1)"} <= set(prepared.outputs)
    assert set(prepare(Levels().eval(), IMAGES, split_shared=Head).outputs) == set(prepared.outputs)
    again = prepare(detector(), IMAGES, split_shared="heads.0.0.act")
    assert "stem.act(17)" in again.outputs
    assert len(prepare(Levels().eval(), IMAGES, split_shared="auto").outputs) == len(prepared.outputs) - 1


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("head.2", r"quant\.split_shared names modules or classes of the model, but got 'head\.2'\. Did you mean"),
        (3, r"quant\.split_shared is report, auto or names of modules, but got 3\. quant\.split_shared=auto splits"),
        ([3], r"is report, auto or names of modules, but got \[3\]"),
    ],
)
def test_what_is_no_module_is_refused(split, message):
    with pytest.raises(ModelError, match=message):
        prepare(Levels().eval(), IMAGES, split_shared=split)


def test_the_line_names_the_places_of_the_object():
    act = nn.SiLU()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), act, nn.Sequential(nn.Conv2d(3, 3, 1), act))
    assert own_modules(model, "1") == "put a copy.deepcopy of it at each of its 2 places: 1, 2.1"
    assert (
        own_modules(Levels(), "head.1")
        == "call a copy.deepcopy of head.1, or of the module around it, each further time"
    )
