"""The cause that an advice names, and its line: following it lowers the error as far as it says."""

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from support.advice import advised, error_with
from torch import nn

import qflow
from qflow import ModuleNameQconfigSetter
from qflow.analysis.measures.override import override
from qflow.core.settings import CalibrationSettings

MINMAX = CalibrationSettings(method="minmax")


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.c2, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.c2(torch.relu(self.c1(x)))).mean((2, 3)))


def pictures(count=4, size=8):
    return [torch.randn(size, 3, 12, 12) for _ in range(count)]


def test_a_scale_that_cuts_off_is_mended_by_a_scale_that_holds_the_values(tmp_path):
    torch.manual_seed(1)
    model, data, cut = Convs(), pictures(), {"c2": "qint8@0.0005"}
    prepared, advice = advised(model, data, tmp_path, ModuleNameQconfigSetter(cut))
    found = advice["c2"]
    assert (found.cause, found.spec.partition("@")[0]) == ("truncation", "qint8")
    with torch.no_grad():
        largest = max(float(torch.relu(model.c2(torch.relu(model.c1(x)))).max()) for x in data)
    assert abs(float(found.spec.partition("@")[2]) * 128 / largest - 1.0) < 0.02
    mended = error_with(model, prepared, data, {"c2": found.spec})
    assert mended < 0.1 * error_with(model, prepared, data, cut)
    assert mended < error_with(model, prepared, data, {"c2": f"qint8@{largest / 256}"})
    assert mended < error_with(model, prepared, data, {"c2": f"qint8@{largest / 32}"})
    assert mended < 1.2 * error_with(model, prepared, data, {"c2": "qint16"})  # int16 would buy nothing


def test_an_input_that_a_percentile_cuts_off_gets_a_scale_too(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(x)

    torch.manual_seed(0)
    data = [torch.randn(64, 16) for _ in range(4)]
    for x in data:
        x[:, 0] *= 3.0
    settings = CalibrationSettings(method="percentile", percentile=95.0)
    model = Sum()
    prepared, advice = advised(model, data, tmp_path, settings=settings)
    found = advice["quant[x]"]
    assert (found.cause, found.source) == ("truncation", "input")
    assert found.line.startswith(r"qconfig.modules={quant\[x\]: qint8@")
    before = error_with(model, prepared, data, {})
    assert error_with(model, prepared, data, {"quant[x]": found.spec}) < 0.5 * before


def test_values_that_only_the_bad_cases_have_count_as_cut_off(tmp_path):
    """Few calibration data: the range is a quarter too small, which minmax cannot know."""
    torch.manual_seed(0)
    model, data = Convs(), pictures()
    data[2] *= 1.4 * float(data[0].abs().max() / data[2].abs().max())
    prepared, advice = advised(model, data, tmp_path, calibration=[data[0]], settings=MINMAX)
    found = advice["quant[x]"]
    assert found.cause == "truncation" and "the bad cases reach" in found.text
    before = error_with(model, prepared, data[2:3], {})
    assert error_with(model, prepared, data[2:3], {"quant[x]": found.spec}) < before


class Twice(nn.Module):
    """One projection called on x and on 1.5 x."""

    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.project(x)) + torch.relu(self.project(1.5 * x)))


def test_the_scale_of_a_shared_module_holds_all_its_calls(tmp_path):
    torch.manual_seed(0)
    model, data, cut = Twice(), [torch.randn(32, 8) for _ in range(3)], {"project": "qint8@0.002"}
    prepared, advice = advised(model, data, tmp_path, ModuleNameQconfigSetter(cut))
    found = advice["project"]
    with torch.no_grad():
        largest = max(float(model.project(1.5 * x).abs().max()) for x in data)
    assert found.cause == "truncation"
    assert abs(float(found.spec.partition("@")[2]) * 128 / largest - 1.0) < 0.02
    assert error_with(model, prepared, data, {"project": found.spec}) < 0.2 * error_with(model, prepared, data, cut)


def test_what_int8_cannot_both_cover_and_resolve_is_raised(tmp_path):
    """One value in a thousand is 300 times the others: any int8 scale either cuts it off or rounds the rest away."""
    torch.manual_seed(0)
    data = [0.1 * torch.randn(64, 16) for _ in range(4)]
    for x in data:
        x[0, 0] = 30.0
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    _, advice = advised(model, data, tmp_path, ModuleNameQconfigSetter({"quant[input]": "qint8@0.22"}))
    assert advice["quant[input]"].spec == "qint16"


def test_a_scale_is_advised_at_the_dtype_that_the_operator_has(tmp_path):
    torch.manual_seed(0)
    model, data = Convs(), pictures()
    setters = ModuleNameQconfigSetter({"c2": "qint16@0.000003"})
    _, advice = advised(model, data, tmp_path, setters)
    assert advice["c2"].cause == "truncation" and advice["c2"].spec.startswith("qint16@")


def test_a_weight_beyond_its_scale_asks_for_a_new_calibration(tmp_path):
    torch.manual_seed(0)
    model, data = Convs(), pictures()
    prepared = qflow.prepare(model.eval(), data[0])
    qflow.calibrate(prepared, data)
    exact = error_with(model, prepared, data, {})
    prepared.weights["c2"].scale.mul_(0.2)  # as if the weights had grown fivefold
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    qa.auto_find_bad_case(data)
    found = qa.advise()[0]
    assert (found.op, found.source, found.cause, found.line) == ("c2", "weight", "truncation", "")
    assert "calibrate the model again" in found.text
    qflow.calibrate(prepared, data)
    assert error_with(model, prepared, data, {}) == exact


class Words(nn.Module):
    """A table with one channel far from the others, a learnt position and a buffer, read before a layer norm."""

    def __init__(self):
        super().__init__()
        self.word, self.norm, self.head = nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 8)
        with torch.no_grad():
            self.word.weight *= 0.05
            self.word.weight[:, 3] += 1.0

    def forward(self, ids):
        return self.head(self.norm(self.word(ids)))


class Rows(Words):
    """The same table as a parameter that is indexed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(self.word.weight.detach().clone())

    def forward(self, ids):
        return self.head(self.norm(self.table[ids]))


@pytest.mark.parametrize(
    ("model", "constant", "name"), [(Words, "const[word.weight]", "word"), (Rows, "const[table]", "table")]
)
def test_a_sensitive_constant_has_a_line_under_its_own_name(model, constant, name, tmp_path):
    torch.manual_seed(0)
    model, data = model(), [torch.randint(0, 50, (4, 12)) for _ in range(3)]
    prepared, advice = advised(model, data, tmp_path)
    found = advice[constant]
    assert (found.cause, found.line) == ("constant", override({constant: "qint16"}))
    assert "must be" not in found.text  # no message about another name
    before, after = error_with(model, prepared, data, {}), error_with(model, prepared, data, {constant: found.spec})
    assert after < 0.8 * before
    assert error_with(model, prepared, data, {name: found.spec}) == after


def test_bad_cases_far_beyond_the_calibration_data_ask_for_such_data(tmp_path):
    torch.manual_seed(0)
    model, data = Convs(), pictures()
    data[2] *= 4.0
    prepared, advice = advised(model, data, tmp_path, calibration=[data[0]], settings=MINMAX)
    found = advice["quant[x]"]
    assert (found.cause, found.line) == ("calibration data", "")
    before = error_with(model, prepared, data[2:3], {})
    scale = found.text.rpartition("a scale of ")[2].partition(" ")[0]
    assert error_with(model, prepared, data[2:3], {"quant[x]": f"qint8@{scale}"}) < before
    qflow.calibrate(prepared, data)
    assert error_with(model, prepared, data[2:3], {}) < 0.5 * before


def test_a_small_scale_can_be_pasted():
    line = override({"c2": "qint8@3.91e-05"})
    assert OverridesParser.create().parse_override(line).value() == {"c2": "qint8@3.91e-05"}
