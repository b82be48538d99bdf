"""qflow as a library: what the doors do, in lines of Python, on a model from the user's side."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import build

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


def test_every_name_that_the_library_page_shows_exists():
    text = (Path(__file__).parent.parent / "docs" / "library.md").read_text()
    names = set(re.findall(r"qflow\.([A-Za-z_]\w*)\b(?=[(,)])", text))
    assert {"prepare", "calibrate", "check", "cost", "configure", "check_text", "TemplateSetter"} <= names
    assert all(hasattr(qflow, name) for name in names)
