"""Files as the plugin writes them: its names, its classes, its tables; and what of them has no operator here."""

import sys
from types import ModuleType

import pytest
import torch
from support.models import ResNet
from torch import nn

import qflow
from qflow.core.errors import ConfigError

CHECK = """
All fusable modules are fused in model!

Each layer out qconfig:
+-------------------------------+--------------------------------+---------------+---------------+----------------+------------------------------+
| Module Name                   | Module Type                    | Input dtype   | out dtype     | ch_axis        | observer                     |
|-------------------------------+--------------------------------+---------------+---------------+----------------+------------------------------|
| stem.0                        | <class 'x.ConvBNReLU2d'>       | ['qint8']     | ['qint16']    | -1             | MovingAverageMinMaxObserver  |
| blocks.0._generated_add_0[add] | <class 'x.ConvBNAddReLU2d'>    | ['qint8']     | qint8         | -1             | FixedScaleObserver           |
| dequant                       | <class 'x.DeQuantStub'>        | torch.float32 | torch.float32 | qconfig = None |                              |
| head                          | <class 'x.Linear'>             | ['qint8']     | torch.float32 | qconfig = None |                              |
+-------------------------------+--------------------------------+---------------+---------------+----------------+------------------------------+

Weight qconfig:
+---------------+--------------------+----------------+-----------+----------------------+
| Module Name   | Module Type        | weight dtype   | ch_axis   | observer             |
|---------------+--------------------+----------------+-----------+----------------------|
| head          | <class 'x.Linear'> | qint16         | 0         | MinMaxObserver       |
+---------------+--------------------+----------------+-----------+----------------------+

Please check if these OPs qconfigs are expected..
+--------------------------------+-----------------------------+--------------------+
| Module Name                    | Module Type                 | Msg                |
|--------------------------------+-----------------------------+--------------------|
| blocks.0._generated_add_0[add] | <class 'x.ConvBNAddReLU2d'> | Fixed scale 0.0625 |
+--------------------------------+-----------------------------+--------------------+
"""  # noqa: E501


@pytest.fixture(scope="module")
def prepared():
    sample = torch.randn(2, 3, 16, 16)
    found = qflow.prepare(ResNet().eval(), sample)
    qflow.calibrate(found, [sample])
    return found


def missed(found):
    return {(u.group, u.name): u.reason for u in found.unmatched}


def test_the_check_file_of_the_plugin(prepared, tmp_path):
    (tmp_path / "model_check_result.txt").write_text(CHECK)
    found = qflow.read_mix(tmp_path / "model_check_result.txt", prepared)
    assert found.modules["stem.0"] == {"output": "qint16"}
    assert found.modules["blocks.0[add]"] == {"output": "qint8", "fixed_scale": 0.0625}
    assert found.modules["head"] == {"output": None, "weight": "qint16"}
    assert [(f.op, f.message) for f in found.findings] == [("blocks.0._generated_add_0[add]", "Fixed scale 0.0625")]
    groups = missed(found)
    assert groups["not sure", "blocks.0._generated_add_0[add] = blocks.0[add]"].startswith("matched by the pattern")
    assert ("not in the model", "dequant") in groups and ("not in the file", "blocks.1.conv1") in groups


def test_dtypes_by_module_with_a_default_a_whole_module_and_dtypes_that_cannot_be_had(prepared, tmp_path):
    dtypes = {
        "": "qint8",
        "blocks.0": "qint16",
        "blocks.0.conv1": {"input": ["qint16"], "weight": "qint8", "output": "qint8"},
        "stem.0": {"dtype": "qint16", "threshold": 2.0},
        "blocks.1.conv1": {"output": torch.float32},
        "head": {"input": "qint8", "weight": "qint4", "output": torch.float32},
        "neck": "qint16",
        "blocks.1.conv2": "qint16",
    }
    torch.save(dtypes, tmp_path / "qconfig_dtypes.pt")
    found = qflow.read_mix(tmp_path / "qconfig_dtypes.pt", prepared)
    assert found.modules["stem.0"] == {"output": "qint16", "fixed_scale": 2.0 / 32768}
    assert found.modules["blocks.0.conv1"] == {"output": "qint8", "weight": "qint8"}  # int16 is what stem.0 gives it
    assert found.modules["blocks.0[add]"] == {"output": "qint16"}
    assert found.modules["quant[x]"] == {"output": "qint8"}
    assert found.modules["head"] == {"output": None}
    groups = missed(found)
    assert ("not in the model", "neck") in groups
    assert groups["cannot be had", "head"] == "weight qint4, a dtype that qflow does not have"
    assert groups["cannot be had", "blocks.1.conv1"].startswith("an output that is not quantized")
    assert groups["not taken over", "blocks.1.conv2"] == "part of blocks.1[add] here"
    assert ("cannot be had", "head: weight qint4, a dtype that qflow does not have") in found.lines()


def test_scales_of_a_calibrated_model_belong_to_the_dtypes_of_another_file(prepared, tmp_path):
    name = "activation_post_process.scale"
    state = {f"stem.0.{name}": torch.tensor([0.02]), f"head.{name}": torch.tensor(1.0), "stem.0.weight": torch.ones(3),
             f"blocks.0.conv1.{name}": torch.ones(4), "head.weight_fake_quant.scale": torch.ones(4)}  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "calibrated.pt")
    torch.save({"stem.0": "qint8"}, tmp_path / "qconfig_dtypes.pt")
    found = qflow.read_mix([tmp_path / "qconfig_dtypes.pt", tmp_path / "calibrated.pt"], prepared)
    assert found.modules == {"stem.0": {"output": "qint8", "fixed_scale": pytest.approx(0.02)}}
    groups = missed(found)
    assert groups["not taken over", "head"] == "its scale is 1, as of a quantizer that has observed nothing"
    assert groups["not taken over", "blocks.0.conv1"] == "a scale for each channel of its output"
    alone = qflow.read_mix(tmp_path / "calibrated.pt", prepared)
    assert missed(alone)["cannot be had", "stem.0"].startswith("a scale without its dtype")


def test_classes_of_the_plugin_are_read_without_it_and_none_of_their_code_runs(prepared, tmp_path, monkeypatch):
    """The plugin pickles the class of an operator and dtypes of its own; here both are texts."""
    module = ModuleType("horizon_plugin_pytorch.dtype")

    class QuantDType(str):
        pass

    QuantDType.__module__, QuantDType.__qualname__ = module.__name__, "QuantDType"
    module.QuantDType = QuantDType
    monkeypatch.setitem(sys.modules, "horizon_plugin_pytorch", ModuleType("horizon_plugin_pytorch"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rows = [["head", "weight", nn.Linear, 2.0, QuantDType("qint8"), "20(1.5%)"], ["norm.x", "activation", nn.ReLU, 3.0]]
    torch.save(rows, tmp_path / "output_0_L1_sensitive_ops.pt")
    torch.save({"stem.0": QuantDType("qint16")}, tmp_path / "qconfig_dtypes.pt")
    monkeypatch.undo()
    table = qflow.read_sensitivity(tmp_path / "output_0_L1_sensitive_ops.pt", prepared)
    assert [(r.op_name, r.op_type, r.quant_dtype, r.flops) for r in table.rows] == [("head", "Linear", "qint8", 20)]
    assert [f.message for f in table.findings] == ["not in the model: norm.x"]
    found = qflow.read_mix(tmp_path / "qconfig_dtypes.pt", prepared)
    assert found.modules == {"stem.0": {"output": "qint16"}}


def test_generated_names_that_the_file_numbers_over_the_whole_model_are_matched_in_order(prepared, tmp_path):
    names = {"_generated_add_0": "qint8", "_generated_add_1": "qint16"}
    torch.save(names, tmp_path / "qconfig_dtypes.pt")
    found = qflow.read_mix(tmp_path / "qconfig_dtypes.pt", prepared)
    assert {name: op["output"] for name, op in found.modules.items()} == {
        "blocks.0[add]": "qint8", "blocks.1[add]": "qint16"
    }  # fmt: skip
    assert (
        "numbers generated names for the whole model" in missed(found)["not sure", "_generated_add_1 = blocks.1[add]"]
    )


def test_names_csv_says_what_a_generated_name_means(prepared, tmp_path):
    torch.save({"my_add": "qint16"}, tmp_path / "qconfig_dtypes.pt")
    (tmp_path / "names.csv").write_text("qflow,plugin,derived,sure\nblocks.1[add],my_add,seen,yes\n")
    found = qflow.read_mix([tmp_path / "qconfig_dtypes.pt", tmp_path / "names.csv"], prepared)
    assert found.modules == {"blocks.1[add]": {"output": "qint16"}}
    with pytest.raises(ConfigError, match="but got 'my_add' and no other in qconfig_dtypes.pt. Take the file of this"):
        qflow.read_mix(tmp_path / "qconfig_dtypes.pt", prepared)
