"""What holds for every target, on the model of every built-in task and on some of others (export/contract.py)."""

import functools
import json
import os
import random

import pytest
import torch
from support.plugin_stand_in import OE_3_0, OE_3_5, executed
from torch import nn
from zoo_real.registry import Entry, entries, images
from zoo_real.timm_models import timm

import qflow
from qflow.core.errors import ConfigError, ModelError
from qflow.core.graph import OpKind
from qflow.export.contract import Exported, ExportError, Subject, written
from qflow.export.model import RECORD, export_model
from qflow.export.native import native, read_native
from qflow.export.targets import TARGETS
from qflow.quant.model.model_state import forward_state
from qflow.quant.trace.calling import named_tensors, run_model
from qflow.tasks import digits, dual, exposure, temporal
from qflow.tasks.perception import model as perception

TASKS = {
    "digits": lambda: (digits.build_model(epochs=0), torch.rand(4, 1, 8, 8)),
    "dual": lambda: (dual.build_model(epochs=0), torch.rand(4, 1, 8, 8)),
    "exposure": lambda: (exposure.build_model(epochs=0), torch.rand(4, 1, 8, 8)),
    "perception": lambda: (perception.build_model(), torch.rand(2, 3, 96, 160)),
    "temporal": lambda: (temporal.build_model(epochs=0), torch.rand(4, 1, 16, 16)),
}
STATE = {"temporal": ("hidden",)}
TWICE = ("digits", "temporal")
"""These are exported twice, to the same bytes: one without state and one with it."""
OTHERS = ("bottlenecks", "vit_block", "point_pillars", "siamese_tracker")
LONG = {
    ("perception", "torch"), ("bottlenecks", "torch"), ("point_pillars", "torch"), ("siamese_tracker", "torch"),
    ("dual", "onnx"),
}  # fmt: skip
"""Proofs. What torch.export makes of these models the target onnx has too, and other models have both targets."""
REFUSED = {("hmct", "temporal")}
"""Target and model that do not go together: the target says so in one line."""


def bottlenecks():
    """The blocks of resnet50, one a stage, on small images."""
    from torchvision.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, (1, 1, 1, 1), num_classes=8, width_per_group=16), images(32, 32)


BLOCKS = {
    "bottlenecks": Entry("bottlenecks", bottlenecks, ("torchvision",)),
    "vit_block": Entry(
        "vit_block", timm("vit_tiny_patch16_224", 32, img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
        ("timm", "torchvision"),
    ),
}  # fmt: skip
"""Real networks with fewer blocks than those of the zoo."""


def entry(name):
    return BLOCKS[name] if name in BLOCKS else entries()[name]


def built(name):
    torch.manual_seed(0)
    if name in TASKS:
        return TASKS[name]()
    if entry(name).missing:
        pytest.skip(f"needs {entry(name).missing}")
    model, inputs = entry(name).made()
    return model, inputs(2)


@functools.cache
def prepared(name):
    """The model with half of its operators in int16, and the first norm in fp16, calibrated on one batch."""
    model, sample = built(name)
    made = qflow.prepare(model, sample, cached_attrs=STATE.get(name, ()))
    names = [node.name for node in made.graph.quantized if node.kind not in (OpKind.input, OpKind.constant)]
    rules = {op: "qint16" for op in random.Random(0).sample(names, len(names) // 2)}
    norms = [node.name for node in made.graph.quantized if node.kind == OpKind.layer_norm][:1]
    rules |= {op: "float16" for op in norms}
    qflow.configure(made, (qflow.ModuleNameQconfigSetter(rules), qflow.HighPrecisionOutput(), qflow.AllInt8Template()))
    qflow.calibrate(made, [sample])
    return made


def read_plugin(folder, model):
    """The module runs against the plugin's names, and holds an entry for every operator with a sure name."""
    module = executed(folder / "qconfig_j6m.py", OE_3_0)
    assert list(module["OPERATORS"]) == list(model.applied.ops)
    assert set(module["module_name_to_qconfig"]) == set(module["names"]().values())
    assert module["calibration_setters"]() and module["qat_setters"]() and module["qat_fixed_act_setters"]()


def read_plugin35(folder, model):
    module = executed(folder / "qconfig_j6m.py", OE_3_5)
    outputs = [name for name, op in model.applied.ops.items() if op.output is not None]
    assert list(module["OUTPUTS"]) == outputs
    assert module["calibration_setter"]() and module["qat_setter"]()


def read_hmct(folder, model):
    """Every name in the file is a node, and every value is a dtype that HMCT knows."""
    import onnx

    config = json.loads((folder / "quant_config.json").read_text())
    nodes = {node.name for node in onnx.load(folder / "model.onnx").graph.node}
    assert config["node_config"] and nodes.issuperset(config["node_config"])
    for entry in config["node_config"].values():
        assert {"qtype", "input0", "input1", "OutputType"}.issuperset(entry)
        assert {"int8", "int16", "float16"}.issuperset(entry.values())
    onnx.checker.check_model(onnx.load(folder / "model.onnx"))


def read_onnx(folder, model):
    """The checker accepts the file, and the quantizer of each operator's result has the operator's name."""
    import onnx

    found = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(found, full_check=True)
    names = {node.name for node in found.graph.node}
    integers = [q.name for q in model.outputs.values() if q.active and q.dtype.is_integer]
    assert [n for n in integers if not names & {f"{n}/QuantizeLinear", f"{n}/DequantizeLinear"}] == []


def read_torch(folder, model):
    """The program gives the outputs of the prepared model, bit for bit."""
    program = torch.export.load(folder / "model.pt2").module()
    with torch.no_grad():
        if model.cached is not None:
            return
        ours = named_tensors(run_model(model, model.sample))
        got = named_tensors(run_model(program, model.sample))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(ours, got, strict=True))


def read_qflow(folder, model):
    assert read_native(folder / "qflow.json").digest == native(Subject(model)).digest


READ = {
    "plugin": read_plugin,
    "plugin35": read_plugin35,
    "hmct": read_hmct,
    "onnx": read_onnx,
    "torch": read_torch,
    "qflow": read_qflow,
}
"""What a reader of the target's files finds."""


def marks(name, target):
    slow, long = name in OTHERS or (name, target) == ("perception", "onnx"), (name, target) in LONG
    return [mark for mark, holds in ((pytest.mark.slow, slow), (pytest.mark.proof, long)) if holds]


@pytest.mark.parametrize(
    ("name", "target"),
    [pytest.param(name, target, marks=marks(name, target)) for name in (*TASKS, *OTHERS) for target in TARGETS],
)
def test_a_target_keeps_the_contract(name, target, tmp_path):
    model = prepared(name)
    before = forward_state(model)
    if (target, name) in REFUSED:
        with pytest.raises(ExportError) as refused:
            export_model(model, target, tmp_path / "one")
        assert "\n" not in str(refused.value)
        assert not list(tmp_path.iterdir())
        return
    exported = export_model(model, target, tmp_path / "one")
    assert isinstance(exported, Exported)
    assert exported.target == target
    files = {path: (tmp_path / "one" / path).read_bytes() for path in exported.files}
    assert exported.files == written(tmp_path / "one")

    if name in TWICE:
        assert export_model(model, target, tmp_path / "elsewhere" / "two") == exported
        assert {path: (tmp_path / "elsewhere" / "two" / path).read_bytes() for path in exported.files} == files

    places = [str(tmp_path), os.getcwd(), os.path.expanduser("~") + "/", "/tmp/", str(os.path.dirname(torch.__file__))]
    for path, content in files.items():
        assert not [place for place in places if place.encode() in content], path

    known = {*model.applied.ops, "model"}
    assert known.issuperset(found.op for found in (*exported.fallbacks, *exported.unexpressed))
    assert all(missed.reason and missed.way_out.endswith(".") for missed in exported.unexpressed)
    assert {name for name, op in model.applied.ops.items() if op.fallback} <= {f.op for f in exported.fallbacks}
    assert forward_state(model) == before
    if target == "plugin":  # a qconfig under the rules of 3.0.x is what its plugin computes
        assert all(fallback.judged for fallback in exported.fallbacks)
        assert "model" not in {missed.op for missed in exported.unexpressed}
    if target in READ:
        READ[target](tmp_path / "one", model)


def test_an_export_replaces_an_earlier_one_and_nothing_else(tmp_path):
    model = prepared("digits")
    export_model(model, "qflow", tmp_path / "out")
    (tmp_path / "out" / "stale.txt").write_text("of an earlier version")
    assert "stale.txt" not in export_model(model, "qflow", tmp_path / "out").files
    assert not (tmp_path / "out" / "stale.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="out=mine-export"):
        export_model(model, "qflow", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert (tmp_path / "out" / RECORD).is_file()


def test_a_failed_export_leaves_the_earlier_one(tmp_path, monkeypatch):
    model = prepared("digits")
    before = export_model(model, "qflow", tmp_path / "out")
    monkeypatch.setattr("qflow.export.native.written", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(model, "qflow", tmp_path / "out")
    assert written(tmp_path) == tuple(sorted(f"out/{path}" for path in before.files))


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="A target is one of plugin, plugin35"):
        export_model(prepared("digits"), "tensorrt", tmp_path / "out")
    plain = qflow.prepare(nn.Sequential(nn.Linear(3, 3)).eval(), torch.randn(2, 3))
    with pytest.raises(ModelError, match="Call qflow.calibrate first"):
        export_model(plain, "qflow", tmp_path / "out")
