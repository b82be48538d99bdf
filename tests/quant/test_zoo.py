"""Every network of the zoo goes the whole way; the equality is in float64, with every quantizer seen to run."""

import copy

import pytest
import torch
from support.zoo import NAMES, Masked, build
from torch.utils._pytree import tree_map

from qflow.analysis.checks.calibration_check import calibration_findings
from qflow.analysis.checks.model_check import check_model
from qflow.config.device_file import load_rules
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.graph import OpKind
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, TemplateSetter, covers
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.model.verify import Observed
from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.qat import train


def double(inputs):
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, inputs)


def largest_error(expected, got):
    pairs = zip(named_tensors(expected), named_tensors(got), strict=True)
    return max(float((a - b).norm() / a.norm()) for (_, a), (_, b) in pairs if a.is_floating_point())


@pytest.mark.parametrize("name", NAMES)
def test_the_float_graph_is_the_model(name):
    model, example = build(name)
    model, example = model.double(), double(example)
    prepared = prepare(model, example)
    with torch.no_grad():
        expected = call_model(model, example)
        assert all(float(t.abs().max()) > 1e-3 for _, t in named_tensors(expected) if t.is_floating_point())
        assert largest_error(expected, call_model(Observed(prepared.observed), example)) < 1e-12
        assert largest_error(expected, call_model(prepared, example)) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_prepare_calibrate_and_run_in_both_precisions(name):
    model, example = build(name)
    prepared = prepare(model, example)
    stats = collect(prepared, [(example, 2)])
    errors = {}
    for dtype in (QDtype.qint8, QDtype.qint16):
        qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], "nash-m")
        apply_scales(prepared, stats, qconfig, CalibrationSettings(method="minmax"))
        with torch.no_grad(), prepared.quantized():
            errors[dtype] = largest_error(call_model(model, example), call_model(prepared, example))
            wanted = {q.name for q in prepared._keys().values() if q.active}
            assert wanted == prepared.ran
            assert not prepared.unseen
    assert errors[QDtype.qint8] < 0.5
    assert errors[QDtype.qint16] < 1.2 * errors[QDtype.qint8]  # int8 weights are in both


def test_a_float_mask_and_returned_weights():
    torch.manual_seed(0)
    model, example = Masked().eval().double(), torch.randn(2, 5, 16, dtype=torch.float64)
    graph = prepare(model, (example,)).graph
    assert graph.by_name["const[mask]"].quantizer == "const[mask]"
    assert [name for name, _ in graph.outputs] == ["0", "1"]


def test_a_prepared_model_copies():
    model, example = build("fpn")
    prepared = prepare(model, example)
    twin = copy.deepcopy(prepared)
    with torch.no_grad():
        assert largest_error(call_model(prepared, example), call_model(twin, example)) == 0.0
    assert twin.outputs["head"] is not prepared.outputs["head"]


def trainable_loss(outputs, batch):
    return sum(t.square().mean() for _, t in named_tensors(outputs) if t.is_floating_point())


@pytest.mark.parametrize("name", NAMES)
def test_a_mix_is_checked_trained_one_step_saved_and_loaded(name, tmp_path):
    model, example = build(name)
    prepared = prepare(model, example)
    stats = collect(prepared, [(example, 2)])
    rules = load_rules("nash-m")
    wide = [n.name for n in prepared.graph.quantized[::3] if n.kind != OpKind.constant]
    setters = [ModuleNameSetter({n: "qint16" for n in wide}), HighPrecisionOutput(), TemplateSetter(QDtype.qint8)]
    requested = resolve(prepared.graph, setters, "nash-m")
    applied = apply_rules(prepared.graph, requested, rules)
    settings = CalibrationSettings(method="minmax")
    findings = apply_scales(prepared, stats, applied, settings)
    asked = {n for n in applied.ops if n.startswith("const[") or any(covers(w, n) for w in wide)}
    assert set(applied.names(QDtype.qint16)) <= asked
    check = check_model(
        prepared.graph, requested, applied, calibration_findings(prepared, stats, applied, findings), "minmax"
    )
    assert {row.op for row in check.rows} == {node.name for node in prepared.graph.quantized}
    assert not check.errors
    before = {k: v.clone() for k, v in prepared.float_state_dict().items()}
    optimizer = torch.optim.SGD(parameter_groups(prepared, {}, 1e-3), lr=1e-3)
    report = train(
        prepared, [(example, None)], trainable_loss, optimizer, settings=QatSettings(steps=1), qconfig=applied,
        calibration=settings,
    )  # fmt: skip
    assert report.finished
    assert any(not torch.equal(v, before[k]) for k, v in prepared.float_state_dict().items())
    torch.save(prepared.state_dict(), tmp_path / "state.pt")
    twin = prepare(model, example)
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad(), prepared.quantized(), twin.quantized():
        assert largest_error(call_model(prepared, example), call_model(twin, example)) == 0.0
    model.load_state_dict(prepared.float_state_dict())  # and back into the float model
