"""Target `torch`: a program and plain files that compute as the prepared model, without qflow."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.temporal import Buffer, FromNone, Queue
from support.zoo import build
from torch import nn

import qflow
from qflow.export.contract import ExportError
from qflow.export.model import export_model
from qflow.export.program import quantized_program
from qflow.quant.trace.calling import named_tensors
from qflow.quant.trace.state import state_of

WITHOUT_QFLOW = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "qflow":
            raise ImportError("qflow is not installed here")
sys.meta_path.insert(0, Blocked())
import json, torch
from safetensors.torch import load_file
program = torch.export.load("model.pt2").module()
with torch.no_grad():
    torch.save(program(torch.load("inputs.pt")), "outputs.pt")
assert load_file("weights.safetensors") and json.load(open("quantization.json"))["scales"]
assert not any(name.startswith("qflow") for name in sys.modules)
"""


def calibrated(model, example, setters=(), **settings):
    prepared = qflow.prepare(model.eval(), example, setters, **settings)
    qflow.calibrate(prepared, [example])
    return prepared


@pytest.mark.slow
def test_the_program_runs_without_qflow_bit_for_bit_at_any_batch_size(tmp_path):
    model, images = build("resnet")
    prepared = calibrated(model, images)
    assert not export_model(prepared, "torch", tmp_path).notes
    more = torch.randn(5, *images.shape[1:])
    torch.save(more, tmp_path / "inputs.pt")
    subprocess.run([sys.executable, "-c", WITHOUT_QFLOW], cwd=tmp_path, check=True, timeout=300)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "outputs.pt"), prepared(more))


def test_the_files_hold_the_float_weights_the_qconfig_and_the_scales(tmp_path):
    model, example = build("shared")
    prepared = calibrated(model, example, [qflow.AllInt16Template()])
    export_model(prepared, "torch", tmp_path)
    weights = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    numbers = json.loads((tmp_path / "quantization.json").read_text())
    assert numbers["scales"] == qflow.scales(prepared)
    assert {name: op["output"] for name, op in numbers["qconfig"].items()} == {
        name: op.output for name, op in prepared.applied.ops.items()
    }


def test_integer_weights_stay_integers_and_half_results_pass_through_half():
    model, example = build("linear_attention")
    wide = {"norm": "float16", "out": "qint16"}
    prepared = calibrated(model, example, [qflow.ModuleNameQconfigSetter(wide), qflow.AllInt8Template()])
    program = quantized_program(prepared)
    held = dict(program.module.named_buffers())
    codes = [value for name, value in held.items() if name.endswith("_codes") and value.ndim == 4]
    assert len(codes) == 3
    assert all(value.dtype == torch.int8 for value in codes)
    text = str(program.module.graph)
    assert "qflow.fake_half" in text
    assert ", 16, out)" in text
    with torch.no_grad():
        assert torch.equal(program.module(example), prepared(example))


class Loop(nn.Module):
    """The Python loop runs as often as there are samples."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.stack([self.linear(row) for row in x])


def test_a_batch_size_that_the_model_fixes_is_said():
    program = quantized_program(calibrated(Loop(), torch.randn(2, 4)))
    assert not program.dynamic
    assert program.notes == ("The batch size is fixed at 1: the model computes with its number.",)


class Branch(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.linear, self.where = nn.Linear(4, 4), where

    def forward(self, x):
        y = self.linear(x)
        if self.where:
            return torch.where(y.sum() > 0, y, y * 2)
        return y if y.sum() > 0 else y * 2


def test_a_path_that_depends_on_values_is_refused_in_one_line_and_the_way_out_works(tmp_path):
    x = torch.randn(2, 4)
    with pytest.raises(ExportError, match=r"data-dependent.*Write the choice as torch\.where") as refused:
        export_model(calibrated(Branch(where=False), x), "torch", tmp_path / "out")
    assert "\n" not in str(refused.value)
    export_model(calibrated(Branch(where=True), x), "torch", tmp_path / "out")


@pytest.mark.parametrize(("kind", "attrs"), [(FromNone, "state"), (Buffer, "memory.seen"), (Queue, "queue")])
def test_state_goes_in_and_comes_out(kind, attrs):
    torch.manual_seed(0)
    frames = [torch.randn(1, 3, 4, 4) for _ in range(6)]
    prepared = calibrated(kind(), frames[0], cached_attrs=attrs)
    program = quantized_program(prepared)
    assert "The first frames of a sequence are not in the program" in program.notes[-1]
    with torch.no_grad():
        for frame in frames[:4]:
            prepared(frame)
        state = state_of(prepared, [attrs])
        for frame in frames[4:]:
            found = program.module(frame, state=state)
            assert torch.equal(found["outputs"], prepared(frame))
            state = found["state"]
            kept = named_tensors(state_of(prepared, [attrs]))
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named_tensors(state), kept, strict=True))
