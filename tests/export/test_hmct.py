"""The quant_config for the ONNX of the float model: its names are nodes, its dtypes those of what the nodes read."""

import csv
import json
import sys

import numpy
import onnx
import onnxruntime
import pytest
import torch
from support.models import Attention, ResNet, Shared, TwoInputs, UNet
from torch import nn

import qflow
from qflow.export.contract import ExportError
from qflow.export.model import export_model
from qflow.quant.trace.calling import named_tensors


def exported(tmp_path, model, sample, rules, **more):
    torch.manual_seed(0)
    setter = qflow.ModuleNameQconfigSetter(rules) if rules else ()
    prepared = qflow.prepare(model.eval(), sample, setter, **more)
    qflow.calibrate(prepared, [sample])
    result = export_model(prepared, "hmct", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quant_config.json").read_text())
    return prepared, result, config["node_config"]


def graph_of(tmp_path):
    return onnx.load(tmp_path / "out" / "model.onnx").graph


def nodes_of(tmp_path):
    with open(tmp_path / "out" / "nodes.csv", newline="") as file:
        return {row["qflow"]: row for row in csv.DictReader(file)}


MODELS = {
    "resnet": (ResNet, (2, 3, 16, 16)),
    "unet": (UNet, (2, 3, 16, 16)),
    "attention": (Attention, (2, 4, 16)),
    "shared": (Shared, (2, 4, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_the_float_model_and_every_operator_has_its_nodes(tmp_path, name):
    build, shape = MODELS[name]
    model = build().eval()
    prepared, result, _ = exported(tmp_path, model, torch.randn(shape), {})
    assert not result.unexpressed
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    sample = prepared.sample[0] if isinstance(prepared.sample, tuple) else prepared.sample
    found = session.run(None, {session.get_inputs()[0].name: sample.numpy()})
    with torch.no_grad():
        expected = named_tensors(model(sample))
    assert [value.name for value in session.get_outputs()] == [name for name, _ in expected]
    for (_, tensor), array in zip(expected, found, strict=True):
        numpy.testing.assert_allclose(array, tensor.numpy(), atol=1e-5)
    rows = nodes_of(tmp_path)
    assert list(rows) == [node.name for node in prepared.graph.nodes]
    known = {node.name for node in graph_of(tmp_path).node}
    for node in prepared.graph.nodes:
        named = rows[node.name]["nodes"].split()
        assert known.issuperset(named)
        assert named or node.kind.value in ("input", "constant")


def test_the_reader_of_an_int16_result_has_int16_inputs(tmp_path):
    """The qconfig puts the norm's output to int16; in the file it is the input of the linear layer behind it."""
    _, _, config = exported(tmp_path, Attention(), torch.randn(2, 4, 16), {"norm": "qint16"})
    assert config == {
        "/qkv/MatMul": {"input0": "int16", "input1": "int8"},
        "/Sub": {"OutputType": "int8"},
    }


def test_one_int16_factor_of_a_matmul(tmp_path):
    _, _, config = exported(tmp_path, Attention(), torch.randn(2, 4, 16), {r"[softmax]": "qint16"})
    assert config["/MatMul_1"] == {"input0": "int16", "input1": "int8"}


def test_int16_weights_and_float16(tmp_path):
    rules = {"norm": "float16", "qkv": {"output": "qint8", "weight": "qint16", "input": ["qint8"]}}
    _, result, config = exported(tmp_path, Attention(), torch.randn(2, 4, 16), rules)
    assert config["/qkv/MatMul"] == {"input0": "int8", "input1": "int16"}
    assert not [missed for missed in result.unexpressed if "float16" in missed.what]


@pytest.mark.parametrize("op", ["norm", "[softmax]"])
def test_an_fp16_operator_is_computed_in_fp16_though_its_reader_casts(tmp_path, op):
    """The linear layer or product behind it reads int8, so that the dtype of the result stands nowhere else."""
    _, result, config = exported(tmp_path, Attention(), torch.randn(2, 4, 16), {op: "float16"})
    floats = {name for name, entry in config.items() if entry.get("qtype") == "float16"}
    assert floats and not [missed for missed in result.unexpressed if missed.op == op]
    with open(tmp_path / "out" / "nodes.csv", newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["qflow"] == op]
    assert floats == set(row["nodes"].split())


def test_an_fp16_operator_with_an_int16_input_is_said(tmp_path):
    rules = {"norm": {"output": "float16", "input": ["qint16"]}}
    _, result, _ = exported(tmp_path, Attention(), torch.randn(2, 4, 16), rules)
    assert [(missed.op, missed.what) for missed in result.unexpressed] == [("norm", "input 0: qint16")]


def test_all_int16_reaches_through_operators_that_move(tmp_path):
    setter = qflow.ModuleNameQconfigSetter({"qkv": "qint16"})
    torch.manual_seed(0)
    prepared = qflow.prepare(Attention().eval(), torch.randn(2, 4, 16), setter, march="nash-m-oe32")
    qflow.calibrate(prepared, [torch.randn(2, 4, 16)])
    export_model(prepared, "hmct", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "quant_config.json").read_text())["node_config"]
    assert config["/Transpose"] == {"qtype": "int16"}
    assert config["/MatMul"] == {"input0": "int16", "input1": "int16"}


def test_three_inputs_of_different_dtypes_are_said(tmp_path):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x):
            return torch.cat([self.a(x), self.b(x), self.c(x)], 1)

    _, result, config = exported(tmp_path, Three(), torch.randn(1, 3, 8, 8), {"b": "qint16"})
    assert config["/Concat"]["qtype"] == "int16"
    assert [missed.op for missed in result.unexpressed] == ["[cat]"]


def test_two_inputs_keep_their_names(tmp_path):
    sample = (torch.randn(2, 3, 8, 8), torch.rand(2, 5, 5, 2) * 2 - 1)
    exported(tmp_path, TwoInputs(), sample, {})
    assert [value.name for value in graph_of(tmp_path).input] == ["image", "points"]
    assert [value.name for value in graph_of(tmp_path).output] == ["0", "1-0", "1-1"]


def test_a_fixed_scale_and_the_method_are_said(tmp_path):
    _, result, _ = exported(tmp_path, ResNet(), torch.randn(2, 3, 16, 16), {"stem.0": "qint8@0.05"})
    assert [(missed.op, missed.what) for missed in result.unexpressed] == [("stem.0", "fixed scale 0.05")]
    assert any("no calibration method mse" in note for note in result.notes)


def test_a_model_with_state_is_refused_in_one_line(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.memory = nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 4, 4)

        def forward(self, x):
            self.memory = self.conv(x) + 0.5 * self.memory
            return self.memory

    with pytest.raises(ExportError, match=r"memory\. Take the state as an input"):
        exported(tmp_path, Counts(), torch.randn(1, 1, 4, 4), {}, cached_attrs="memory")


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"needs the extra export.*pip install 'qflow\[export\]'"):
        exported(tmp_path, ResNet(), torch.randn(2, 3, 16, 16), {})
