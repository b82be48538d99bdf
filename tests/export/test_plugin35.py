"""The module for OpenExplorer 3.5 and later, executed against the plugin's public names."""

import torch
from support.models import Attention, ResNet
from support.plugin_stand_in import OE_3_5, ModuleNameTemplate, executed

import qflow
from qflow.export.model import export_model


def calibrated(model, sample, rules):
    torch.manual_seed(0)
    prepared = qflow.prepare(model.eval(), sample, qflow.ModuleNameQconfigSetter(rules), march="nash-m-oe32")
    qflow.calibrate(prepared, [sample], qflow.CalibrationSettings(divisor="plugin"))
    return prepared


def test_thresholds_fix_the_judged_scales_and_are_frozen(tmp_path):
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16), {"stem.0": "qint8"})
    export_model(prepared, "plugin35", tmp_path / "out")
    setter = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_5)["calibration_setter"]()
    last = setter.templates[-1]
    assert isinstance(last, ModuleNameTemplate) and last.freeze
    assert list(last.config_mapping) == ["stem.0", "blocks.0.conv1", "blocks.1.conv1"]
    for name, entry in last.config_mapping.items():
        assert entry["dtype"] == prepared.applied.ops[name].output
        assert entry["threshold"] / 128 == qflow.scales(prepared)[name]


def test_int16_weights_and_inputs_are_ports(tmp_path):
    prepared = calibrated(Attention(), torch.randn(4, 4, 16), {"norm": "qint16", "qkv": "qint16/qint16"})
    exported = export_model(prepared, "plugin35", tmp_path / "out")
    module = executed(tmp_path / "out" / "qconfig_j6m.py", OE_3_5)
    assert module["PORTS"] == {
        "qkv": {"input": ["qint16"], "weight": "qint16"},
        "[matmul]": {"input": ["qint16", "qint16"]},
        "[matmul](1)": {"input": ["qint8", "qint16"]},
    }
    assert module["named"](module["PORTS"]).keys() == {"qkv"}
    assert module["OUTPUTS"]["qkv"]["threshold"] / 32768 == qflow.scales(prepared)["qkv"]
    assert module["OUTPUTS"]["norm"] == {"dtype": "qint16"}  # a threshold might reach the values inside
    assert [missed.what[:13] for missed in exported.unexpressed if missed.op == "norm"] == ["scales: outpu"]
    assert any("PORTS" in note or "earlier entry" in note for note in exported.notes)


def test_a_high_precision_output_is_left_to_the_plugin_and_said(tmp_path):
    prepared = calibrated(ResNet(), torch.randn(4, 3, 16, 16), {"stem.0": "qint8"})
    exported = export_model(prepared, "plugin35", tmp_path / "out")
    assert ("head", "high-precision output") in [(missed.op, missed.what) for missed in exported.unexpressed]
