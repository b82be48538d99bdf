"""The module for OpenExplorer 3.0.x, executed against the plugin's public names."""

import csv
import re

import pytest
import torch
from safetensors.torch import load_file
from support.models import Attention, ResNet
from support.plugin_stand_in import OE_3_0, OTHER_PLACES, executed
from torch import nn

import qflow
from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.export.model import export_model


def calibrated(model, sample, setter=(), divisor="plugin", **more):
    torch.manual_seed(0)
    prepared = qflow.prepare(model.eval(), sample, setter, **more)
    qflow.calibrate(prepared, [sample], qflow.CalibrationSettings(divisor=divisor))
    return prepared


def names_of(folder):
    with open(folder / "names.csv", newline="") as file:
        return {row["qflow"]: row for row in csv.DictReader(file)}


class Stubs(nn.Module):
    """Two stubs whose order differs from that of the inputs, and a FloatFunctional."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.ao.quantization.QuantStub(), torch.ao.quantization.QuantStub()
        self.conv, self.add = nn.Conv2d(3, 3, 1), torch.ao.nn.quantized.FloatFunctional()

    def forward(self, image, extra):
        extra = self.first(extra)
        return self.add.add(torch.relu(self.conv(self.second(image))), extra) * 0.5


def test_every_named_operator_has_the_judged_dtype_and_scale(tmp_path):
    """The fixed scale of each module is that of the prepared model; the others are left to the default setter."""
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16), qflow.ModuleNameQconfigSetter({"stem.0": "qint16"}))
    export_model(prepared, "plugin", tmp_path / "out")
    module = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_0)
    found = module["module_name_to_qconfig"]
    assert list(found) == ["stem.0", "blocks.0.conv1", "blocks.1.conv1", "head"]
    for name, qconfig in found.items():
        op = prepared.applied.ops[name]
        if op.output is None:
            assert qconfig.activation is None
        else:
            quantizer = qconfig.activation()
            assert (quantizer.dtype, quantizer.observer.scale) == (op.output, qflow.scales(prepared)[name])
        assert qconfig.weight().dtype == "qint8"
    named, default = module["calibration_setters"]()
    assert named.module_name_to_qconfig == found
    assert default.name == "default_calibration_qconfig_setter"


def test_qat_moves_what_calibration_found_and_keeps_what_was_given(tmp_path):
    setter = qflow.ModuleNameQconfigSetter(
        {"stem.0": "qint8@0.05", "blocks.0.conv1": {"output": "qint8", "frozen": True}}
    )
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16), setter)
    export_model(prepared, "plugin", tmp_path / "out")
    module = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_0)
    named, default = module["qat_setters"]()
    assert default.name == "default_qat_qconfig_setter"
    observers = {
        n: q.activation and type(q.activation().observer).__name__ for n, q in named.module_name_to_qconfig.items()
    }
    assert observers == {
        "stem.0": "FixedScaleObserver",
        "blocks.0.conv1": "FixedScaleObserver",
        "blocks.1.conv1": "MinMaxObserver",
        "head": None,
    }
    named, default = module["qat_fixed_act_setters"]()
    assert default.name == "default_qat_fixed_act_qconfig_setter"
    kept = {n: q.activation and q.activation().observer.scale for n, q in named.module_name_to_qconfig.items()}
    assert kept == {**{n: qflow.scales(prepared)[n] for n in observers if n != "head"}, "head": None}


def test_a_norm_keeps_the_scales_that_the_plugin_finds_and_the_judged_ones_are_listed(tmp_path):
    """A fixed scale of its output might hold for the values inside too, which are int16 with scales of their own."""
    prepared = calibrated(Attention(), torch.randn(4, 4, 16), qflow.ModuleNameQconfigSetter({"norm": "qint8@0.05"}))
    exported = export_model(prepared, "plugin", tmp_path / "out")
    module = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_0)
    assert type(module["module_name_to_qconfig"]["norm"].activation().observer).__name__ == "MSEObserver"
    qat = module["qat_fixed_act_setters"]()[0].module_name_to_qconfig["norm"].activation().observer
    assert type(qat).__name__ == "MinMaxObserver" and qat.averaging_constant == 0
    (missed,) = [found for found in exported.unexpressed if found.op == "norm"]
    assert not exported.faithful and missed.what.startswith("scales: output 0.05, ")
    for name in prepared.graph.by_name["norm"].inner:
        assert f"{name.removeprefix('norm.')} {float(prepared.outputs[name].scale):.6g}" in missed.what


def test_the_axis_of_a_transposed_weight_is_said(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, 2), nn.ReLU())
    exported = export_model(calibrated(model, torch.randn(2, 3, 8, 8)), "plugin", tmp_path / "out")
    found = [(missed.op, missed.what) for missed in exported.unexpressed if "weight" in missed.what]
    assert found == [("1", "weight scales along axis 1")]


@pytest.mark.parametrize("places", OTHER_PLACES)
def test_names_are_found_where_the_plugin_may_keep_them(tmp_path, places):
    export_model(calibrated(ResNet(), torch.randn(4, 3, 16, 16)), "plugin", tmp_path / "out")
    path = tmp_path / "out" / "qconfig_j6m.py"
    assert executed(path, OTHER_PLACES[places])["OPERATORS"] == executed(path, OE_3_0)["OPERATORS"]


def test_stubs_and_functionals_of_the_user_are_sure(tmp_path):
    prepared = calibrated(Stubs(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    exported = export_model(prepared, "plugin", tmp_path / "out")
    names = names_of(tmp_path / "out")
    assert {op: (row["plugin"], row["sure"]) for op, row in names.items()} == {
        "quant[image]": ("second", "yes"),
        "quant[extra]": ("first", "yes"),
        "conv": ("conv", "yes"),
        "[add]": ("add", "yes"),
        "[mul]": ("_generated_mul_0", "no"),
    }
    assert [missed.op for missed in exported.unexpressed] == ["[mul]"]


def test_a_name_that_the_user_found_takes_part(tmp_path):
    prepared = calibrated(Attention(), torch.randn(4, 4, 16))
    export_model(prepared, "plugin", tmp_path / "out")
    path = tmp_path / "out" / "qconfig_j6m.py"
    assert "_generated_sub_7" not in executed(path, OE_3_0)["module_name_to_qconfig"]
    text = (tmp_path / "out" / "names.csv").read_text()
    row = next(line for line in text.splitlines() if line.startswith("[sub]"))
    found = row.replace("_generated_sub_0", "_generated_sub_7")
    (tmp_path / "out" / "names.csv").write_text(text.replace(row, found[: -len("no")] + "yes"))
    module = executed(path, OE_3_0)
    quantizer = module["module_name_to_qconfig"]["_generated_sub_7"].activation()
    assert quantizer.observer.scale == qflow.scales(prepared)["[sub]"]
    assert ("[sub]", "_generated_sub_7") in module["missing"](nn.Identity())
    assert ("norm", "norm") not in module["missing"](Attention())


def test_requantized_inputs_and_float16(tmp_path):
    rules = {"norm": "float16", "[sub]": {"output": "qint16", "input": [None, "qint8"]}, "proj": "qint16"}
    prepared = calibrated(Attention(), torch.randn(4, 4, 16), qflow.ModuleNameQconfigSetter(rules))
    export_model(prepared, "plugin", tmp_path / "out")
    text = (tmp_path / "out" / "names.csv").read_text().replace(",no\n", ",yes\n")
    (tmp_path / "out" / "names.csv").write_text(text)
    found = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_0)["module_name_to_qconfig"]
    assert [found["norm"].activation().dtype, found["norm"].input().dtype] == [torch.float16] * 2
    none, requantized = found["_generated_sub_0"].input
    assert none is None
    call, slot = prepared.reads_of(prepared.graph.by_name["[sub]"])[0][1]
    assert requantized().observer.scale == float(prepared.requants_at[call][slot].scale)


@pytest.mark.parametrize(("divisor", "said"), [("guide", True), ("plugin", False)])
def test_weight_scales_of_another_divisor_are_said(tmp_path, divisor, said):
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16), divisor=divisor)
    exported = export_model(prepared, "plugin", tmp_path / "out")
    weights = [missed for missed in exported.unexpressed if missed.what.startswith("weight scales")]
    assert bool(weights) is said
    assert not said or "calibration.divisor=plugin" in weights[0].way_out


def test_what_only_a_later_release_computes_is_said(tmp_path):
    """int16 weights on int16 inputs need OpenExplorer 3.2; the plugin of 3.0.x refuses them."""
    setter = qflow.ModuleNameQconfigSetter({"norm": "qint16", "qkv": "qint16/qint16"})
    prepared = calibrated(Attention(), torch.randn(4, 4, 16), setter, march="nash-m-oe32")
    exported = export_model(prepared, "plugin", tmp_path / "out")
    refused = [missed for missed in exported.unexpressed if missed.op == "model"]
    assert "qkv" in refused[0].reason
    assert not exported.faithful


def test_the_weights_load_into_the_float_model(tmp_path):
    model = ResNet()
    prepared = calibrated(model, torch.randn(4, 3, 16, 16))
    with torch.no_grad():
        prepared.model.head.weight.mul_(2.0)
    export_model(prepared, "plugin", tmp_path / "out")
    fresh = ResNet()
    fresh.load_state_dict(torch.load(tmp_path / "out" / "weights.pt", weights_only=True))
    assert torch.equal(fresh.head.weight, prepared.model.head.weight)
    assert load_file(tmp_path / "out" / "weights.safetensors").keys() == fresh.state_dict().keys()


def test_the_sensitivity_table_has_the_plugins_names(tmp_path):
    found = [("[add]", "activation", 0.5), ("conv", "weight", 0.1)]
    rows = [SensitivityRow(op, kind, "t", score, "qint8", 0, outputs=(("0", score),)) for op, kind, score in found]
    table = SensitivityTable(metric="L1", merge="max", samples=1, exact=True, rows=tuple(rows))
    prepared = calibrated(Stubs(), (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)))
    exported = export_model(prepared, "plugin", tmp_path / "out", sensitivity=table)
    assert "output_0_L1_sensitive_ops.pt" in exported.files
    loaded = torch.load(tmp_path / "out" / "output_0_L1_sensitive_ops.pt", weights_only=True)
    assert [row[:2] for row in loaded] == [["add", "activation"], ["conv", "weight"]]
    assert "output_0_L1_sensitive_ops.pt" in (tmp_path / "out" / "README.md").read_text()


def test_the_lines_of_the_readme_are_those_of_the_module(tmp_path):
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16))
    export_model(prepared, "plugin", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    module = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_0)
    named = set(re.findall(r"qconfig_j6m\.(\w+)", text)) - {"py"}
    assert named == {"MARCH", "calibration_setters", "missing"}
    assert named <= module.keys()
    assert {"qat_fixed_act_setters", "qat_setters"} <= module.keys()


class Parts(nn.Module):
    """An activation called twice, and a module that stays on the host."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.host = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Sigmoid(), nn.Softplus()

    def forward(self, x):
        return self.b(self.host(self.act(self.a(x)))) + self.act(x)


def test_what_a_shared_or_skipped_module_loses_is_said(tmp_path):
    prepared = calibrated(Parts(), torch.randn(2, 3, 8, 8), split_shared="auto", skip="host")
    exported = export_model(prepared, "plugin", tmp_path / "out")
    missed = {found.op: found.what for found in exported.unexpressed}
    assert missed["act(1)"] == "its own scale"
    assert missed["host"] == "float"
    named = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_0)["module_name_to_qconfig"]
    assert named["act"].activation().observer.scale == qflow.scales(prepared)["act"]


def test_a_wrong_argument_does_not_pass_the_stand_in(tmp_path):
    """The stand-in refuses what the plugin would: a scale of 0, an unknown dtype, a wrong argument."""
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16))
    export_model(prepared, "plugin", tmp_path / "out")
    path = tmp_path / "out" / "qconfig_j6m.py"
    text = path.read_text()
    for old, new in (("scale=scale", "scales=scale"), ("weight_dtype=weight", "weights=weight"), ("dtype=dtype)", ")")):
        path.write_text(text.replace(old, new))
        with pytest.raises((TypeError, AssertionError)):
            executed(path, OE_3_0)["qat_setters"]()
