"""The calibration method of each operator is chosen by the error of the outputs, and never against the user."""

import importlib
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import zoo
from support.rounding import all_at
from support.torchvision_ops import declare
from support.zoo import build
from torch import nn

import qflow
from qflow.core.dtype import QDtype
from qflow.core.setter import ModuleNameSetter, ObserverSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.prepare import prepare
from qflow.repair.base.contract import KEPT, Context
from qflow.repair.calibration.observers import Observers, best, observed
from qflow.repair.calibration.output_error import output_errors
from qflow.repair.run import repair
from qflow.tasks import digits
from qflow.tasks.perception.data import build_data
from qflow.tasks.perception.model import build_model


def rare(samples=64, gain=30.0):
    """Images with two large values in a thousand."""
    torch.manual_seed(0)
    x = torch.randn(samples, 1, 16, 16)
    return torch.where(torch.rand(x.shape) < 2e-3, x.sign() * gain, x)


def small(act=None):
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, padding=1), act or nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8, 4)).eval()


def calibrated(model, batches, method="mse", dtype=QDtype.qint8):
    prepared = prepare(model, batches[0])
    sized = [(batch, len(batch)) for batch in batches]
    context = Context(sized, all_at(prepared, dtype), CalibrationSettings(method=method))
    context.calibrate(prepared)
    return prepared, context


def test_the_estimate_is_the_error_that_the_quantizer_causes_alone():
    """Behind the quantizer the network is linear, so the first order is exact; the mean is over signs and samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 6)).eval()
    x = torch.randn(512, 16)
    prepared, _ = calibrated(model, [x])
    name = "0"
    scales = [float(prepared.outputs[name].scale) * factor for factor in (0.2, 1.0, 4.0)]
    estimates = output_errors(prepared, [(x, 512)], {name: scales})[name]
    with torch.no_grad(), prepared.only(outputs=[name], weights=["0", "1"]):
        outputs = {}
        for scale in [*scales, 1e-7]:
            if scale == 1e-7:
                prepared.outputs[name].enabled = False
            else:
                prepared.outputs[name].set_scale(scale)
            outputs[scale] = prepared(x)
    with torch.no_grad(), prepared.quantized():
        size = float(prepared(x).square().sum(1).mean())
    for scale, found in zip(scales, estimates, strict=True):
        wanted = float((outputs[scale] - outputs[1e-7]).square().sum(1).mean()) / size
        noise = float(found.std()) / math.sqrt(len(found))
        assert abs(float(found.mean()) - wanted) < 4 * noise + 0.02 * wanted


def test_samples_that_are_not_on_the_first_axis_have_the_same_mean():
    """A transposed network gives one row for all samples of a pass, and a constant has none of its own."""

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(16, 12), nn.Linear(12, 6)
            self.shift = nn.Parameter(torch.randn(12))

        def forward(self, x):
            y = (self.inner(x) + self.shift).t().contiguous() * 2.0
            return self.outer(y.t())

    torch.manual_seed(0)
    x = torch.randn(640, 16)
    prepared, _ = calibrated(Turned().eval(), [x])
    scales = {q: [3 * float(prepared.outputs[q].scale)] for q in prepared.outputs if prepared.outputs[q].calibrated}
    found = output_errors(prepared, [(x, 640)], scales)
    shapes = {name: tuple(errors.shape) for name, errors in found.items()}
    assert shapes["inner"] == (1, 1280) and shapes["const[shift]"][1] == 1280 // 16
    assert all(bool(errors.isfinite().all()) and float(errors.mean()) > 0 for errors in found.values())


@given(st.lists(st.lists(st.floats(0, 1e3), min_size=6, max_size=6), min_size=1, max_size=5), st.floats(0, 10))
def test_the_chosen_scale_never_has_a_larger_error_than_the_present_one(rows, least):
    errors = torch.tensor(rows, dtype=torch.float64)
    chosen = best(errors, least)
    gain = float((errors[0] - errors[chosen]).mean())
    assert chosen == 0 or (gain > 0 and gain > least * (1 - 1e-9))


def test_a_method_that_cuts_off_what_the_outputs_need_is_replaced():
    model, x = small(), rare()
    prepared, _ = calibrated(model, x.split(16))
    sized = [(batch, 16) for batch in x.split(16)]
    kl = CalibrationSettings(method="kl")  # it takes the rare values for noise
    found, context, table = repair(prepared, sized, all_at(prepared), kl, [Observers()])
    assert table.rows[0].verdict == KEPT and table.after < table.before / 4
    assert table.rows[0].changed["quant[input]"].startswith("kl -> minmax, threshold 4.0")
    op = context.qconfig.ops["quant[input]"]
    assert (op.observer, op.own_observer) == ("minmax", False) and op.rule.endswith("repair: observer minmax")
    assert float(found.outputs["quant[input]"].scale) == pytest.approx(30 / 128)
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), model.parameters(), strict=True))


def test_a_method_that_covers_what_the_outputs_do_not_need_is_replaced():
    """A layer norm with channels 64 times as large as the others, which the next layer multiplies with 1/64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[1].weight[::16] *= 64
        model[2].weight[:, ::16] /= 64
    x = torch.randn(256, 16)
    prepared, context = calibrated(model, x.split(64), "minmax")
    parts, _ = Observers().parts(prepared, context)
    assert [(part.name, part.data.method) for part in parts] == [("1", "kl")]
    before, after = parts[0].data.changed.split("threshold ")[1].split(" -> ")
    assert float(after) < 0.9 * float(before)


def test_what_the_user_has_set_stands_and_is_named():
    model, x = small(), rare()
    prepared, context = calibrated(model, x.split(16), "kl")
    ops = context.qconfig.ops
    held = {
        "fixed_scale": (0.03, "its scale is fixed"),
        "known_range": ((-4.0, 4.0), "its scale follows from its known range"),
        "frozen": (True, "its scale is frozen"),
        "own_observer": (True, "its observer was set by name"),
    }
    for field, (value, reason) in held.items():
        changed = replace(ops["quant[input]"], **{field: value})
        context.qconfig = context.qconfig.with_ops({"quant[input]": changed})
        context.calibrate(prepared)
        parts, refused = Observers().parts(prepared, context)
        assert refused["quant[input]"] == reason
        assert "quant[input]" not in {part.name for part in parts}
    set_by_name = qflow.prepare(model, x[:2], qconfig_setter=(ModuleNameSetter({"quant[input]": {"observer": "kl"}}),
                                                              qflow.TemplateSetter("qint8")))  # fmt: skip
    repaired, table = qflow.repair_model(set_by_name, x.split(16), steps=["observers"])
    assert repaired.applied.ops["quant[input]"].observer == "kl"
    assert any(row.parts == ("quant[input]",) and "set by name" in row.reason for row in table.rows)


def test_int16_takes_another_method_as_its_own_and_never_kl():
    op = qflow.OpQConfig(QDtype.qint16)
    assert observed(op, "mse") == replace(op, observer="mse", own_observer=True, rule="; repair: observer mse")
    prepared, context = calibrated(small(), rare(gain=1e5).split(16), dtype=QDtype.qint16)
    parts, refused = Observers().parts(prepared, context)
    assert {part.name for part in parts} | set(refused) == {node.name for node in prepared.graph.quantized} - {"5"}
    assert all(part.data.method != "kl" for part in parts)
    Observers().apply(prepared, context, parts)
    context.calibrate(prepared)


def test_no_gradient_and_no_choice_are_reasons():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x).detach())

    torch.manual_seed(0)
    x = torch.randn(64, 4) ** 3
    prepared, context = calibrated(Detached().eval(), [x])
    _, refused = Observers().parts(prepared, context)
    assert refused["quant[x]"] == "no gradient of an output reaches it"
    prepared, context = calibrated(small(), [torch.ones(16, 1, 16, 16)])
    _, refused = Observers().parts(prepared, context)
    assert refused["quant[input]"] == "all methods give the same threshold"


@pytest.mark.parametrize("name", ["mobilenet", "convnext", "detr", "bev", "functional", "two_inputs"])
def test_networks_of_every_kind_pass_through_it(name):
    model, example = build(name)
    prepared = prepare(model, example)
    context = Context([(example, 2)], all_at(prepared), CalibrationSettings())
    context.calibrate(prepared)
    parts, refused = Observers().parts(prepared, context)
    names = {part.name for part in parts} | set(refused)
    active = {n.name for n in prepared.graph.quantized if prepared.outputs[n.quantizer].calibrated}
    assert names == active and not ({part.name for part in parts} & set(refused))
    assert not any(parameter.grad is not None for parameter in prepared.model.parameters())


def test_a_shared_module_is_one_part_and_equal_data_give_equal_choices():
    model, example = zoo()["shared"]
    x = torch.cat([example * (i + 1) for i in range(8)])
    found = []
    for _ in range(2):
        prepared, context = calibrated(model, [x], "minmax")
        found.append(Observers().parts(prepared, context))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_detector_loses_less_with_methods_of_its_own():
    data = build_data()
    x = torch.stack([data.calibration[i][0] for i in range(96)])
    prepared = qflow.prepare(build_model().eval(), x[:2])
    prepared.settings = CalibrationSettings(method="minmax")
    _, table = qflow.repair_model(prepared, x.split(32), steps=["observers"])
    assert table.after < 0.7 * table.before
    assert table.forwards < 12 * table.samples


@pytest.mark.slow
def test_a_transformer_with_large_channels_in_its_norms_loses_less():
    """A vision transformer of timm; four channels of each layer norm are 32 times as large, their readers 1/32."""
    declare()
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm.VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10).eval()
    with torch.no_grad():
        for block in model.blocks:
            for norm, reader in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[::12] *= 32
                reader.weight.mul_(4)[:, ::12] /= 32
    x = torch.randn(96, 3, 32, 32)
    prepared = qflow.prepare(model, x[:2])
    prepared.settings = CalibrationSettings(method="minmax")
    found, table = qflow.repair_model(prepared, x.split(32), steps=["observers", "weight_clipping"])
    assert [row.step for row in table.kept] == ["observers"]
    assert table.after < 0.85 * table.before
    assert all(torch.equal(p, q) for p, q in zip(found.model.parameters(), model.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["digits", "exposure", "dual"])
def test_built_in_tasks_never_lose_more_and_say_why_not(task):
    module = importlib.import_module(f"qflow.tasks.{task}")
    data = (digits if task == "dual" else module).build_data()
    prepared = qflow.prepare(module.build_model(), data.calibration.tensors[0][:2])
    _, table = qflow.repair_model(prepared, data.calibration.tensors[0].split(32), steps=["observers"])
    assert table.after <= table.before
    reasons = {row.reason for row in table.rows}
    if task == "dual":
        assert table.after < 0.95 * table.before and table.rows[0].parts == ("conv1", "conv2")
    if task == "exposure":
        assert "its gradient is not finite" in reasons, "the level of a black image is 1 / sqrt(0)"


def test_methods_go_to_another_mix_and_the_copy_is_a_prepared_model_like_any(tmp_path):
    model, x = small(), rare()
    prepared = qflow.prepare(model, x[:2])
    prepared.settings = CalibrationSettings(method="kl")
    found, table = qflow.repair_model(prepared, x.split(16), steps=("observers", "weight_clipping"))
    assert table.rows[0].verdict == KEPT and prepared.applied.ops["quant[input]"].observer is None
    scale = float(found.outputs["quant[input]"].scale)
    other = qflow.prepare(small(), x[:2])
    other.load_state_dict(found.state_dict())
    exported = qflow.export_model(found, "plugin", tmp_path / "handover")
    assert any(f"{scale!r}" in file.read_text() for file in (tmp_path / "handover").rglob("*.py")), exported
    with torch.no_grad():
        wanted = found(x)
        assert torch.equal(other(x), wanted)
        template = qflow.TemplateSetter("qint8")
        kept = ObserverSetter.of(found.applied)
        applied = qflow.configure(found, (kept, qflow.HighPrecisionOutput(), template))
        assert applied.ops["quant[input]"].observer == "minmax" and torch.equal(found(x), wanted)
        wide = qflow.configure(found, (ModuleNameSetter({"quant[input]": "qint16"}), kept, template))
        assert (wide.ops["quant[input]"].output, wide.ops["quant[input]"].observer) == (QDtype.qint16, None)
        qflow.configure(found, template)
        assert float(found.outputs["quant[input]"].scale) < scale / 4, "without the setter the method is the trial's"
