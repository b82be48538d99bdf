"""Findings on ranges: true for the values that came, once each, and no advice that the device or the error refuses."""

import pytest
import torch
from support.advice import error_with
from support.zoo import NAMES, build
from torch import nn

import qflow
from qflow.core.device_rules import DeviceRules
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.raisable import raisable


def checked(model, data, setters=()):
    prepared = qflow.prepare(model.eval(), data[0], setters)
    qflow.calibrate(prepared, data)
    return prepared, qflow.check(prepared).findings


class Bounded(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.head = function, nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.function(x))


FILLING = {
    "sigmoid": (lambda x: torch.sigmoid(4.0 * x), "0..1"),
    "tanh": (lambda x: torch.tanh(4.0 * x), "-1..1"),
    "ReLU6": (lambda x: nn.functional.relu6(4.0 * x), "0..6"),
    "clamp": (lambda x: x.clamp(-0.5, 2.0), "-0.5..2"),
    "softmax of few": (lambda x: torch.softmax(5.0 * x, -1), "0..1"),
}
SPARSE = {
    "sigmoid near 0": lambda x: torch.sigmoid(x - 8.0),
    "tanh near 0": lambda x: torch.tanh(0.01 * x),
    "hardsigmoid around a half": lambda x: nn.functional.hardsigmoid(0.1 * x),
    "ReLU6 below 0.5": lambda x: nn.functional.relu6(0.1 * x),
    "clamp far away": lambda x: (0.1 * x).clamp(-100.0, 100.0),
    "softmax of many": lambda x: torch.softmax(0.1 * x, -1),
    "normalized": lambda x: nn.functional.normalize(x, dim=-1),
}


def hints(findings):
    return [(f.op, f.message.rpartition("qint8@")[2]) for f in findings if "fit exactly" in f.message]


@pytest.mark.parametrize("name", FILLING)
def test_a_bounded_function_is_hinted_at_where_its_values_fill_the_bound(name):
    function, bounds = FILLING[name]
    torch.manual_seed(0)
    model, data = Bounded(function), [torch.randn(16, 32) for _ in range(3)]
    prepared, findings = checked(model, data)
    ((op, spec),) = hints(findings)
    assert spec == bounds
    before = error_with(model, prepared, data, {})
    assert error_with(model, prepared, data, {op: f"qint8@{spec}"}) < 1.1 * before


@pytest.mark.parametrize("name", SPARSE)
def test_values_far_below_the_bound_are_not_told_to_take_its_scale(name):
    torch.manual_seed(0)
    _, findings = checked(Bounded(SPARSE[name]), [torch.randn(16, 32) for _ in range(3)])
    assert hints(findings) == []


def test_a_fixed_scale_that_wastes_the_codes_is_named_and_calibration_is_better():
    torch.manual_seed(0)
    model, data = Bounded(lambda x: torch.softmax(0.1 * x, -1)), [torch.randn(16, 32) for _ in range(3)]
    name = {"[softmax]": "qint8@0..1"}
    prepared, findings = checked(model, data, qflow.ModuleNameQconfigSetter(name))
    (told,) = [f.message for f in findings if f.op == "[softmax]" and f.level == "check"]
    assert "of 128 codes: leave its scale to calibration" in told
    assert error_with(model, prepared, data, {}) < 0.5 * error_with(model, prepared, data, name)


class Loud(nn.Module):
    """Three operators above 10, of which one decides the output's error."""

    def __init__(self):
        super().__init__()
        self.near, self.far, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        near = torch.tanh(self.near(x) * 40.0 - 20.0)
        return self.head(torch.sin(self.far(x) * 40.0) + 0.01 * near)


def test_what_is_not_sensitive_is_information(tmp_path):
    """Two shared activations whose calls differ alike, but the error of the second hardly reaches the output."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.loud, self.quiet, self.head = nn.SiLU(), nn.SiLU(), nn.Linear(8, 4)

        def forward(self, x):
            loud, quiet = self.loud(self.loud(x) * 20.0), self.quiet(self.quiet(x) * 20.0)
            return self.head(loud) + 1e-4 * self.head(quiet)

    torch.manual_seed(0)
    model, data = Twice(), [torch.randn(32, 8) for _ in range(3)]
    prepared, findings = checked(model, data)
    cases = {f.op: f.level for f in findings if "case C" in f.message}
    assert cases == {"loud": "check", "quiet": "check"}
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    qa.auto_find_bad_case(data)
    qa.sensitivity()
    found = {f.op: f for f in qflow.check(prepared).findings if "case C" in f.message}
    assert {op: f.level for op, f in found.items()} == {"loud": "check", "quiet": "info"}
    assert found["quiet"].message.endswith("; it is not sensitive")


def above(findings):
    return [(f.level, f.op, f.message) for f in findings if "above 10" in f.message]


def test_operators_above_ten_are_one_finding_that_names_the_sensitive_ones(tmp_path):
    torch.manual_seed(0)
    model, data = Loud(), [torch.randn(32, 16) for _ in range(3)]
    prepared, findings = checked(model, data)
    ((level, op, text),) = above(findings)
    assert (level, op) == ("check", "model") and text.startswith("above 10 in int8: 3 operators, [sub] (")
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    qa.auto_find_bad_case(data)
    qa.sensitivity()
    ((level, op, text),) = above(qflow.check(prepared).findings)
    assert (level, text) == (
        "check",
        "above 10 in int8: 3 operators, of these sensitive: [mul](1); try qint16 for these",
    )
    fine = {"quant[x]": "qint16", "far": "qint16"}  # what the factor of 40 makes of their errors
    before = error_with(model, prepared, data, fine)
    assert error_with(model, prepared, data, {**fine, "[mul](1)": "qint16"}) < 0.5 * before


def test_a_wide_range_that_is_not_sensitive_is_information(tmp_path):
    class Saturates(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(x + 0.001 * torch.tanh(x * 40.0))

    torch.manual_seed(0)
    model, data = Saturates(), [torch.randn(32, 16) for _ in range(3)]
    prepared, _ = checked(model, data)
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    qa.auto_find_bad_case(data)
    qa.sensitivity()
    ((level, op, text),) = above(qflow.check(prepared).findings)
    assert (level, op) == ("info", "[mul]") and "is not sensitive" in text


@pytest.mark.parametrize(("spec", "told"), [("qint8@0..200", True), ("qint8@-5..5", False), ("qint16@0..200", False)])
def test_the_rule_of_thumb_goes_by_a_known_range(spec, told):
    torch.manual_seed(0)
    data = [20.0 * torch.rand(8, 4) for _ in range(2)]
    setter = qflow.ModuleNameQconfigSetter({"quant[input]": spec})
    _, findings = checked(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), data, setter)
    assert any("quant[input]" in op + text for _, op, text in above(findings)) == told


class Resized(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return nn.functional.interpolate(self.conv(x) * 40.0, scale_factor=2.0)


def test_what_the_device_keeps_at_int8_is_not_advised_to_be_raised():
    torch.manual_seed(0)
    prepared, findings = checked(Resized(), [torch.randn(2, 3, 8, 8) for _ in range(2)])
    assert float(prepared.stats.histograms["[interpolate]"].largest) > 10.0
    assert above(findings) == []


def test_a_fixed_scale_is_not_told_to_take_what_the_device_lowers():
    torch.manual_seed(0)
    data = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    setter = qflow.ModuleNameQconfigSetter({"[interpolate]": "qint8@0..9000", "quant[x]": "qint8@0..900"})
    _, findings = checked(Resized(), data, setter)
    told = {f.op: f.message.rpartition(": ")[2] for f in findings if "of 128 codes" in f.message}
    assert told == {
        "[interpolate]": "leave its scale to calibration",
        "quant[x]": "leave its scale to calibration, or take qint16",
    }


def test_of_two_matmul_inputs_either_can_be_raised_but_not_a_square():
    a, b = (OpNode(n, OpKind.input, "input", (), (1, 4, 4), n) for n in "ab")
    both = OpNode("m", OpKind.matmul, "torch.matmul", ("a", "b"), (1, 4, 4), "m")
    square = OpNode("s", OpKind.matmul, "torch.matmul", ("a", "a"), (1, 4, 4), "s")
    rules = DeviceRules("nash-m", "3.0.17", matmul_int16_inputs=1)
    assert raisable(ModelGraph((a, b, both), (("0", "m"),)), rules, "ab") == ("a", "b")
    assert raisable(ModelGraph((a, square), (("0", "s"),)), rules, "a") == ()


@pytest.mark.parametrize("name", NAMES[:6])
def test_no_text_is_printed_twice_and_shared_modules_are_judged_once(name):
    model, example = build(name)
    _, findings = checked(model, [example])
    texts = [(f.level, f.message) for f in findings]
    assert len(set(texts)) == len(texts)
    shared = [f.op for f in findings if f.message.startswith("shared module")]
    assert len(set(shared)) == len(shared)
