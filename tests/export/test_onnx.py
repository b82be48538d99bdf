"""Target `onnx`: onnxruntime computes the codes of the prepared model, within one step an operator."""

import sys

import numpy as np
import pytest
import torch
from support.onnx_witness import RUNTIMES, by_kind, compare, run
from support.temporal import Queue
from support.zoo import build
from torch import nn
from zoo_real.registry import entries

import qflow
from qflow.export.contract import ExportError
from qflow.export.model import export_model
from qflow.export.onnx import OPSET
from qflow.quant.trace.calling import named_tensors
from qflow.quant.trace.state import state_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MIXED = {"norm": "float16", "qkv": "qint16", "out": "qint16"}


def calibrated(model, example, setters=(), **settings):
    prepared = qflow.prepare(model.eval(), example, setters, **settings)
    qflow.calibrate(prepared, [example])
    return prepared


def exported(prepared, folder):
    notes = export_model(prepared, "onnx", folder).notes
    return onnx.load(folder / "model.onnx"), notes


def within_one_step(prepared, example):
    for runtime, found in compare(prepared, example).items():
        for kind, differences in by_kind(prepared, found.forced).items():
            assert differences.count
            assert differences.more == 0, (runtime, kind, differences)
        yield runtime, found


def test_both_round_half_to_even_and_saturate(tmp_path):
    x = torch.arange(-600, 600).reshape(2, -1) / 4.0  # in steps of half a code
    prepared = calibrated(nn.Sequential(nn.Hardtanh(-100.0, 100.0)), x)
    for quantizer in prepared.outputs.values():
        quantizer.set_scale(0.5)
    model, _ = exported(prepared, tmp_path)
    for runtime in RUNTIMES:
        (got,) = run(model, {"input": x.numpy()}, runtime)[0].values()
        assert np.array_equal(got, prepared(x).detach().numpy()), runtime


def test_weights_are_integers_behind_a_dequantizer_and_quantizers_have_the_names_of_the_qconfig(tmp_path):
    model, example = build("linear_attention")
    prepared = calibrated(model, example, [qflow.ModuleNameQconfigSetter(MIXED), qflow.AllInt8Template()])
    found, _ = exported(prepared, tmp_path)
    onnx.checker.check_model(found, full_check=True)
    assert [(o.domain, o.version) for o in found.opset_import] == [("", OPSET)]
    held = {tensor.name: tensor for tensor in found.graph.initializer}
    for name in ("inner", "qkv", "out"):
        codes = onnx.numpy_helper.to_array(held[f"{name}.weight/codes"])
        assert codes.dtype == np.int8
        scale = prepared.weights[name].scale
        restored = torch.from_numpy(codes) * scale
        assert (
            float((restored - model.get_submodule(name).weight).abs().max()) <= float(scale.max()) * 1.001
        )  # 128 of -128..127 ends at 127
    nodes = {node.name: node for node in found.graph.node}
    kinds = {node.output[0]: node.op_type for node in found.graph.node}
    assert held[nodes["qkv/QuantizeLinear"].input[2]].data_type == onnx.TensorProto.INT16
    assert held[nodes["inner/QuantizeLinear"].input[2]].data_type == onnx.TensorProto.INT8
    assert "norm/Cast" in nodes
    assert kinds[nodes["inner/QuantizeLinear"].input[0]] == "Conv"


def test_each_operator_is_within_one_step_of_onnxruntime():
    model, example = build("fpn")
    runtimes = dict(within_one_step(calibrated(model, example), example))
    assert runtimes["plain"].integer_kernels == 0
    assert runtimes["integer"].integer_kernels > 3
    assert all(differences.equal == 1.0 for differences in runtimes["plain"].forced.values())


SMALL = [(qflow.AllInt8Template, name) for name in ("squeeze_excite", "linear_attention", "mobilenet", "detr")]
SMALL += [(qflow.AllInt16Template, name) for name in ("mobilenet", "vision_transformer")]
AGAIN = [(qflow.AllInt8Template, "vision_transformer"), (qflow.AllInt16Template, "detr")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "name"), [*SMALL, *(pytest.param(*pair, marks=pytest.mark.proof) for pair in AGAIN)]
)
def test_the_small_networks_are_within_one_step(template, name):
    model, example = build(name)
    for _, found in within_one_step(calibrated(model, example, [template()]), example):
        assert sum(d.one for d in found.forced.values()) <= 0.02 * sum(d.count for d in found.forced.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param("yolo_shared_activation", marks=pytest.mark.proof), "lift_splat", "siamese_tracker"]
)
def test_real_networks_are_within_one_step(name):
    entry = entries()[name]
    if entry.missing:
        pytest.skip(f"needs {entry.missing}")
    model, inputs = entry.made()
    example = inputs(2)
    assert dict(within_one_step(calibrated(model, example), example))


def test_the_batch_size_is_free(tmp_path):
    model, images = build("shared")
    prepared = calibrated(model, images)
    found, notes = exported(prepared, tmp_path)
    assert not notes
    more = torch.randn(5, *images.shape[1:])
    (got,) = run(found, {"x": more.numpy()}, "fused")[0].values()
    step = max(float(quantizer.scale) for quantizer in prepared.outputs.values())
    assert np.abs(got - prepared(more).detach().numpy()).max() <= step


def test_state_is_an_input_and_an_output(tmp_path):
    torch.manual_seed(0)
    frames = [torch.randn(1, 3, 4, 4) for _ in range(5)]
    prepared = calibrated(Queue(), frames[0], cached_attrs="queue")
    model, notes = exported(prepared, tmp_path)
    assert "The first frames of a sequence are not in the program" in notes[-1]
    with torch.no_grad():
        for frame in frames[:4]:
            prepared(frame)
        names = [value.name for value in model.graph.input]
        state = {f"self.{n}": t.numpy() for n, t in named_tensors(state_of(prepared, ["queue"]))}
        assert names == ["x", *state]
        found, _ = run(model, {"x": frames[4].numpy(), **state}, "plain")
        ours = prepared(frames[4])
        assert np.allclose(found["output0"], ours.numpy(), atol=1e-5)
        for name, tensor in named_tensors(state_of(prepared, ["queue"])):
            assert np.allclose(found[f"next.self.{name}"], tensor.numpy(), atol=1e-5)


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.eigvals(self.linear(x)).real


def test_an_operator_that_onnx_lacks_is_refused_in_one_line(tmp_path):
    with pytest.raises(ExportError, match=r"torch\.onnx translates.*linalg_eig.*target torch") as refused:
        export_model(calibrated(Unknown(), torch.randn(2, 4, 4)), "onnx", tmp_path / "out")
    assert "\n" not in str(refused.value)
    export_model(calibrated(Unknown(), torch.randn(2, 4, 4)), "torch", tmp_path / "out")


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    model, images = build("shared")
    with pytest.raises(ExportError, match=r"pip install 'qflow\[export\]'") as refused:
        export_model(calibrated(model, images), "onnx", tmp_path / "out")
    assert "\n" not in str(refused.value)
