"""A cause is planted in a network that was sound; the tools must name the operator first, and the advisor the cause."""

import copy

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from qflow.analysis.advice.advisor import advise
from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.measures.override import override
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.tasks.task import batches, model_inputs

ALLOWED = lambda operator, spec: ""  # noqa: E731


def examine(model, cases, calibration=None, tamper=None, refused=ALLOWED):
    """(sensitivity table, layer table, advice) of the all-int8 model, its scales tampered with."""
    calibration = cases if calibration is None else calibration
    prepared = prepare(model, cases)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m")
    size = len(calibration[0] if isinstance(calibration, tuple) else calibration)
    stats = collect(prepared, [(calibration, size)], sampling=1)
    apply_scales(prepared, stats, qconfig, CalibrationSettings(method="minmax"))
    if tamper is not None:
        tamper(prepared)
    table = sensitivity(model, prepared, [cases])
    layers = compare_layers(model, prepared, cases)
    return table, layers, advise(prepared, stats, table, layers, refused)


@pytest.fixture(scope="module")
def digits(digits_task):
    images = torch.cat([model_inputs(digits_task, b)[0] for b, _ in batches(digits_task, "calibration", 64, 1)])
    return copy.deepcopy(digits_task.model).eval(), images


def firsts(table, count):
    return {(row.op_name, row.sensitive_type) for row in table.rows[:count]}


def test_a_sound_network_has_no_start_of_error(digits):
    table, layers, _ = examine(*digits)
    assert layers.start == ""
    assert table.rows[0].score < 0.1


def test_channels_that_are_scaled_up_and_undone_are_found_where_they_are(digits):
    """Half of conv3's channels times 200, undone by the dense layer: the float function is the same."""
    model, images = copy.deepcopy(digits[0]), digits[1]
    with torch.no_grad():
        before = model(images)
        model.norm3.weight[:16] *= 200.0
        model.norm3.bias[:16] *= 200.0
        model.dense.weight.view(10, 32, 16)[:, :16] /= 200.0
        assert torch.allclose(model(images), before, atol=1e-3)
    table, _, advice = examine(model, images)
    assert firsts(table, 2) == {("conv3", "activation"), ("dense", "weight")}
    assert table.rows[1].score > 5 * table.rows[2].score
    assert {a.op: (a.cause, a.source) for a in advice[:2]} == {
        "conv3": ("rounding", "activation"),
        "dense": ("rounding", "weight"),
    }
    assert {a.line for a in advice[:2]} == {
        "qconfig.modules={conv3: qint16}",
        "qconfig.modules={dense: {weight: qint16}}",  # the output stays high precision
    }
    assert advice[0].gain + advice[1].gain > 0.8


def test_a_scale_that_cuts_off_is_a_truncation(digits):
    def clip(prepared):
        prepared.outputs["conv2"].scale.mul_(0.2)

    table, layers, advice = examine(*digits, tamper=clip)
    assert firsts(table, 1) == {("conv2", "activation")}
    assert (advice[0].op, advice[0].cause) == ("conv2", "truncation")
    assert dict(advice[0].figures)["clipped share"] > 0.01
    row = next(r for r in layers.rows if r.quantizer == layers.start)
    assert layers.start == "conv2"
    assert row.analy_model_max < 0.5 * row.base_model_max  # the guide's sign of truncation


class TwoInputs(nn.Module):
    """An image, and a vector that lies at 100 and varies by one."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, image, speed):
        x = torch.relu(self.conv(image)).mean((2, 3))
        return self.head(x + torch.tanh(self.fc(speed - 100.0)))


def test_an_input_far_from_zero_is_an_input_that_wants_int16():
    torch.manual_seed(0)
    model = TwoInputs().eval()
    table, _, advice = examine(model, (torch.randn(16, 3, 8, 8), 100.0 + torch.rand(16, 4) - 0.5))
    assert firsts(table, 1) == {("quant[speed]", "activation")}
    assert (advice[0].op, advice[0].source, advice[0].cause) == ("quant[speed]", "input", "rounding")
    assert advice[0].line == r"qconfig.modules={quant\[speed\]: qint16}"


class Shares(nn.Module):
    """One projection for two ranges that differ by forty."""

    def __init__(self):
        super().__init__()
        self.stem, self.project, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        near = self.project(x)
        far = self.project(40.0 * x) / 40.0
        return self.head((torch.sigmoid(near) - torch.sigmoid(far * 0.5)).mean((2, 3)))


def test_a_module_shared_between_two_ranges_is_called_so():
    torch.manual_seed(0)
    _, _, advice = examine(Shares().eval(), torch.randn(16, 3, 8, 8))
    assert (advice[0].op, advice[0].cause) == ("project", "shared module")
    values = dict(advice[0].figures)
    assert values["call max"] > 20 * values["call min"]


def test_calibration_data_of_another_kind_are_the_cause(digits):
    model, images = digits
    _, _, advice = examine(model, images, calibration=images * 0.25)
    assert advice[0].cause == "calibration data"
    assert advice[0].line == ""
    assert dict(advice[0].figures)["float max"] > 2 * dict(advice[0].figures)["calibration max"]


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Sigmoid()

    def forward(self, x):
        x = self.a(x)
        return self.b(x * self.gate(x))


def test_a_known_range_wants_a_fixed_scale():
    torch.manual_seed(0)

    def loosen(prepared):
        prepared.outputs["gate"].scale.fill_(0.2)

    _, _, advice = examine(Gate().eval(), torch.randn(8, 3, 8, 8), tamper=loosen)
    assert (advice[0].op, advice[0].cause) == ("gate", "known range")
    assert advice[0].line == "qconfig.modules={gate: qint8@0..1}"


def test_what_the_device_would_undo_is_not_advised(digits):
    def clip(prepared):
        prepared.outputs["conv2"].scale.mul_(0.2)

    _, _, advice = examine(*digits, tamper=clip, refused=lambda operator, spec: f"{operator} takes int8 only")
    assert advice[0].line == ""
    assert "not kept here: conv2 takes int8 only" in advice[0].text


def test_weight_and_activation_both_sensitive_is_dual_int16(digits):
    model, images = copy.deepcopy(digits[0]), digits[1]

    def ruin(prepared):
        prepared.outputs["conv2"].scale.mul_(12.0)
        prepared.weights["conv2"].scale.mul_(12.0)

    _, _, advice = examine(
        model, images, tamper=ruin, refused=lambda operator, spec: "no int16 x int16" if "/" in spec else ""
    )
    assert (advice[0].op, advice[0].cause, advice[0].source) == ("conv2", "dual int16", "weight and activation")
    assert "in the float model" in advice[0].text
    assert advice[0].line == "qconfig.modules={conv2: qint16}"


def test_where_the_output_stays_int8_a_sensitive_weight_is_raised_alone(digits):
    def ruin(prepared):
        prepared.outputs["conv2"].scale.mul_(12.0)
        prepared.weights["conv2"].scale.mul_(12.0)

    only_int8 = lambda operator, spec: "its reader takes int8 only" if spec.startswith("qint16") else ""  # noqa: E731
    _, _, advice = examine(copy.deepcopy(digits[0]), digits[1], tamper=ruin, refused=only_int8)
    assert (advice[0].op, advice[0].source) == ("conv2", "weight")
    assert advice[0].line == "qconfig.modules={conv2: {weight: qint16}}"
    assert advice[0].text.endswith("its output is sensitive too, but stays int8: its reader takes int8 only")


REFUSED = ["1", "null", "a'b", "-1", "1e3", "\u00e9", "nan"]


@pytest.mark.parametrize("name", ["[add]", "[add](1)", "0.conv", "head.box", "a b", "layer-1", "m/2", *REFUSED])
def test_a_line_is_read_back_as_it_was_meant_or_is_not_given(name):
    line = override({name: "qint16"})
    assert bool(line) == (name not in REFUSED)
    if line:
        assert OverridesParser.create().parse_override(line).value() == {name: "qint16"}


class Peaky(nn.Module):
    """Softmax over many tokens: its range is 0..1, its values are far below."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.b(torch.softmax(0.1 * self.a(x), -1))


def test_a_calibrated_range_below_a_known_one_is_no_cause():
    """Fixed to 0..1 the values of such a softmax would lie on two codes."""
    torch.manual_seed(0)
    _, _, advice = examine(Peaky().eval(), torch.randn(32, 8))
    assert all(a.cause != "known range" for a in advice)


class HugeMask(nn.Module):
    """Scores with -1e9 where the future is: half of the values."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.triu(torch.full((6, 6), -1e9), 1))

    def forward(self, x):
        return torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) + self.mask, -1) @ self.v(x)


def test_a_huge_mask_is_named_and_not_advised_away():
    torch.manual_seed(0)
    _, _, advice = examine(HugeMask().eval(), torch.randn(8, 6, 8))
    masked = [a for a in advice if a.op == "[add]"]
    assert [(a.cause, a.line) for a in masked] == [("huge mask value", "")]
    assert "masked_fill(mask, float('-inf'))" in masked[0].text


def test_advice_needs_rows_at_the_models_own_dtype(digits):
    model, images = digits
    prepared = prepare(model, images)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m")
    stats = collect(prepared, [(images, len(images))])
    apply_scales(prepared, stats, qconfig, CalibrationSettings())
    table = sensitivity(model, prepared, [images], rows=candidates(prepared, QDtype.float16))
    with pytest.raises(ConfigError, match="Advice goes by rows at the model's own dtypes, but got float16"):
        advise(prepared, stats, table, None, ALLOWED)
