"""qflow as a library: what the commands do, in lines of Python, on a model from the user's side."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.zoo import build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qflow


@pytest.fixture
def prepared():
    model, example = build("resnet")
    return qflow.prepare(model, example, qconfig_setter=qflow.default_calibration_qconfig_setter, march="nash-m")


def test_prepare_calibrate_check_and_cost(prepared):
    model, example = build("resnet")
    with torch.no_grad():
        assert torch.equal(prepared(example), model(example))
    data = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.zeros(8)), batch_size=4)
    qflow.calibrate(prepared, data)
    with torch.no_grad():
        difference = (prepared(example) - model(example)).norm() / model(example).norm()
    assert 0.0 < float(difference) < 0.2
    check = qflow.check(prepared)
    assert {row.op for row in check.rows} == set(qflow.scales(prepared)) - {f"{n}.weight" for n in prepared.weights}
    assert qflow.cost(prepared).latency_ms > 0.0


def test_the_plugins_states(prepared):
    example = build("resnet")[1]
    qflow.set_fake_quantize(prepared, qflow.FakeQuantState.CALIBRATION)
    with torch.no_grad():
        floating = prepared(example)
        qflow.set_fake_quantize(prepared, qflow.FakeQuantState.VALIDATION)
        assert not torch.equal(prepared(example), floating)
        qflow.set_fake_quantize(prepared, qflow.FakeQuantState.FLOAT)
        assert torch.equal(prepared(example), floating)


def test_validation_without_calibration_is_refused(prepared):
    with pytest.raises(qflow.core.errors.ModelError, match=r"Call qflow.calibrate first"):
        qflow.set_fake_quantize(prepared, qflow.FakeQuantState.VALIDATION)


def test_module_names_are_raised_to_int16_and_read_back():
    model, example = build("resnet")
    setter = qflow.ModuleNameQconfigSetter({"quant[x]": qflow.get_qconfig(out_dtype="qint16")})
    prepared = qflow.prepare(model, example, (setter, qflow.default_calibration_qconfig_setter))
    qflow.calibrate(prepared, [example])
    rows = {row.op: row for row in qflow.check(prepared).rows}
    assert rows["quant[x]"].applied == "qint16"
    assert rows["stem.0"].applied == "qint8"


def test_a_fix_scale_is_kept_and_the_check_says_which_kind():
    model, example = build("resnet")
    named = {"quant[x]": qflow.get_qconfig(fix_scale=8.0 / 128), "stem.0": qflow.get_qconfig("mse", fix_scale=True)}
    prepared = qflow.prepare(model, example, qflow.ModuleNameQconfigSetter(named))
    qflow.calibrate(prepared, [example])
    assert qflow.scales(prepared)["quant[x]"] == 0.0625
    check = qflow.check(prepared)
    assert ("quant[x]", "Fixed scale 0.0625") in [(f.op, f.message) for f in check.findings]
    rows = {row.op: row.observer for row in check.rows}
    assert (rows["quant[x]"], rows["stem.0"]) == ("fixed scale", "mse, kept in QAT")


def test_a_skipped_module_stays_float_and_what_it_gives_is_quantized_again():
    class Decoder(nn.Module):
        def forward(self, x):
            return x * 2.0 if float(x.sum()) > 0 else x * 3.0

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.decode, self.last = nn.Conv2d(3, 4, 1), Decoder(), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.last(self.decode(self.conv(x)))

    torch.manual_seed(0)
    model, example = Net().eval(), torch.randn(2, 3, 8, 8)
    assert any("taken from a tensor by float" in n for n in qflow.prepare(model, example).graph.notes)
    for skip in (["decode"], ["Decoder"], [Decoder]):
        prepared = qflow.prepare(model, example, skip=skip)
        assert [n.name for n in prepared.graph.nodes] == ["quant[x]", "conv", "decode", "last"]
        assert prepared.graph.by_name["decode"].quantizer == "decode"
        assert not prepared.graph.notes
        qflow.calibrate(prepared, [example])
        with torch.no_grad():
            prepared(example)
        assert "decode" in prepared.ran
    with pytest.raises(qflow.core.errors.ModelError, match="names modules or classes of the model, but got 'nothing'"):
        qflow.prepare(model, example, skip=["nothing"])


def test_a_value_by_a_way_that_tracing_cannot_see_is_refused():
    class Numpy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x) + torch.from_numpy(x.detach().numpy() * 2)

    with pytest.raises(qflow.core.errors.ModelError, match=r"read by \[add\].*Write it in torch"):
        qflow.prepare(Numpy().eval(), torch.randn(2, 4))


def test_importing_qflow_is_light():
    code = "import sys, qflow; print([m for m in ('torch', 'hydra', 'mlflow', 'optuna') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_name_that_the_library_pages_show_exists():
    text = "".join(page.read_text() for page in sorted((Path(__file__).parents[2] / "docs").glob("library*.md")))
    names = set(re.findall(r"qflow\.([A-Za-z_]\w*)\b(?=[(,)])", text))
    assert {"prepare", "calibrate", "check", "cost", "configure", "check_text", "TemplateSetter"} <= names
    assert all(hasattr(qflow, name) for name in names)


def calibrated(setter=qflow.default_calibration_qconfig_setter):
    model, example = build("resnet")
    prepared = qflow.prepare(model, example, setter)
    qflow.calibrate(prepared, [example])
    return prepared, model, example


def test_a_saved_state_is_used_again(tmp_path):
    prepared, model, example = calibrated(qflow.TemplateSetter("qint16"))
    torch.save(prepared.state_dict(), tmp_path / "state.pt")
    other = qflow.prepare(model, example, march="nash-e")  # int8, another march: the state says what it was
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(example), prepared(example))
        assert not torch.equal(other(example), model(example))
        qflow.set_fake_quantize(other, qflow.FakeQuantState.FLOAT)
        assert torch.equal(other(example), model(example))
        qflow.set_fake_quantize(other, qflow.FakeQuantState.VALIDATION)
        assert torch.equal(other(example), prepared(example))
    assert qflow.check(other) == qflow.check(prepared)
    assert (other.march, other.applied.digest) == ("nash-m", prepared.applied.digest)
    qflow.configure(other, qflow.TemplateSetter("qint8"))
    with pytest.raises(qflow.core.errors.ModelError, match="Call qflow.calibrate first"):
        qflow.set_fake_quantize(other, qflow.FakeQuantState.VALIDATION)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.usual, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.rare(x) * 2.0 if float(x.mean()) > 1.0 else self.usual(x)


def test_what_calibration_reaches_first_is_named():
    example = torch.zeros(2, 4)
    prepared = qflow.prepare(Branch().eval(), example)
    assert ("rare", "never called: not quantized") in {(f.op, f.message) for f in qflow.check(prepared).findings}
    findings = qflow.calibrate(prepared, [torch.randn(2, 4), torch.ones(2, 4) * 5])
    named = {f.op: f.message for f in findings}
    assert all("Skip the module" in named[op] for op in ("rare", "[mul]"))
    said = [f.message for f in qflow.check(prepared).findings if f.op == "rare"]
    assert said == [named["rare"]]
    for state in (qflow.FakeQuantState.CALIBRATION, qflow.FakeQuantState.VALIDATION):
        qflow.set_fake_quantize(prepared, state)
        prepared(torch.randn(2, 4))
    assert "rare" not in {f.op for f in prepared.findings}


def test_cost_is_that_of_one_sample_unless_asked(prepared):
    one, example = qflow.cost(prepared), build("resnet")[1]
    assert one.shapes == {"quant[x]": (1, *example.shape[1:])}
    assert qflow.cost(prepared, example).gmacs == pytest.approx(len(example) * one.gmacs)
    assert one.fps == pytest.approx(1000.0 / one.bpu_ms)
    with pytest.raises(qflow.core.errors.ModelError, match="must run at the shape that is costed"):
        qflow.cost(prepared, torch.zeros(1, 5, 16, 16))
    assert str(inspect.signature(qflow.cost)).startswith("(prepared")
    assert {"prepare", "cost", "get_qconfig", "TemplateSetter"} <= set(dir(qflow))


def test_what_a_dict_batch_has_too_much_is_dropped():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, image):
            return self.lin(image)

    image = torch.randn(2, 4)
    prepared = qflow.prepare(Named().eval(), {"image": image})
    qflow.calibrate(prepared, [{"image": image, "label": torch.zeros(2)}])
    assert prepared.stats.samples == 2
    with pytest.raises(qflow.core.errors.ModelError, match=r"the batch has the keys picture, forward takes image\)"):
        qflow.prepare(Named().eval(), {"picture": image})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: qflow.TemplateSetter("int16"), r"dtype is one of qint8, .* but got 'int16'"),
        (lambda m, x: qflow.prepare(m, x, {"stem": "qint16"}), r"but got dict. .*ModuleNameQconfigSetter"),
        (lambda m, x: qflow.prepare(m, x, skip="stemm"), r"but got 'stemm'. Did you mean stem"),
        (lambda m, x: qflow.set_fake_quantize(qflow.prepare(m, x), "float"), r"FakeQuantState.VALIDATION.* but got 'f"),
        (lambda m, x: qflow.prepare(m, x, march="nash-x"), r"A device is one of nash-e"),
    ],
)
def test_mistakes_are_one_line(call, message):
    model, example = build("resnet")
    with pytest.raises(qflow.core.errors.QflowError, match=message) as error:
        call(model, example)
    assert "\n" not in str(error.value)


def test_one_name_may_be_skipped_without_a_list():
    model, example = build("resnet")
    assert qflow.prepare(model, example, skip="stem").plan.skipped == {"stem"}
