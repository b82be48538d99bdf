"""The prepared model as a module: its state is the float model's and more, and it survives what modules survive."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.models import ResNet, revive, zoo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, ModuleNameSetter, TemplateSetter
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.train.qat import train
from qflow.quant.train.qat_state import qat_state

NAMES = list(zoo())


def calibrated(name, dtype=QDtype.qint8):
    model, example = zoo()[name]
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, 2)]), qconfig, CalibrationSettings(method="minmax"))
    return model, example, prepared


def outputs(model, inputs):
    with torch.no_grad():
        return [t for _, t in named_tensors(call_model(model, inputs))]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def quantized(prepared, inputs):
    with prepared.quantized():
        return outputs(prepared, inputs)


def perturb(prepared):
    with torch.no_grad():
        for parameter in prepared.model.parameters():
            parameter.mul_(1.1)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_goes_to_the_float_model_and_back(name):
    model, example, prepared = calibrated(name)
    assert list(prepared.float_state_dict()) == list(model.state_dict())
    perturb(prepared)
    model.load_state_dict(prepared.float_state_dict())
    assert equal(outputs(model, example), outputs(prepared, example))
    other = zoo()[name][0]
    prepared.load_float_state_dict(other.state_dict())
    assert equal(outputs(other, example), outputs(prepared, example))
    user = {f"model.{k}" for k in model.state_dict()}
    extra = set(prepared.state_dict()) - user
    assert user <= set(prepared.state_dict())
    assert {k.rpartition(".")[2] for k in extra} == {"scale", "sides", "_extra_state"}


@pytest.mark.parametrize("name", NAMES)
def test_a_state_carries_the_calibration_to_a_fresh_model(name):
    _, example, prepared = calibrated(name)
    fresh = prepare(*zoo()[name])
    perturb(prepared)
    fresh.load_state_dict(prepared.state_dict())
    assert equal(quantized(prepared, example), quantized(fresh, example))


def test_a_state_brings_its_dtypes_and_requantized_inputs_and_switches(tmp_path):
    model, example = zoo()["resnet"]
    prepared, fresh = prepare(model, example), prepare(model, example)
    add = next(n.name for n in prepared.graph.quantized if n.fused_add)
    asked = ModuleNameSetter({add: {"output": "qint16", "input": "qint8"}})
    setters = [asked, HighPrecisionOutput(), TemplateSetter(QDtype.qint16)]
    settings = CalibrationSettings(method="minmax", float16_clip=True)
    apply_scales(prepared, collect(prepared, [(example, 2)]), resolve(prepared.graph, setters, "nash-m"), settings)
    assert len(prepared.requants)
    with prepared.quantized():
        expected = outputs(prepared, example)
        torch.save(prepared.state_dict(), tmp_path / "state.pt")
        save_file(prepared.state_dict(), tmp_path / "state.safetensors")
    for state in (torch.load(tmp_path / "state.pt", weights_only=True), load_file(tmp_path / "state.safetensors")):
        fresh.load_state_dict(state)  # saved while quantized: it computes quantized
        assert equal(outputs(fresh, example), expected)
        assert [q.clip for q in fresh.outputs.values()] == [True] * len(fresh.outputs)
    other = prepare(model, example, skip=[prepared.graph.quantized[1].name])
    with pytest.raises(ModelError, match=r"prepared alike, but got another quantizer at .*same skip\.$"):
        other.load_state_dict(state)
    with pytest.raises(ModelError, match=r"got none \(no _extra_state\)"):
        fresh.load_state_dict({k: v for k, v in state.items() if k != "_extra_state"})
    with pytest.raises(ModelError, match="Save prepared.state_dict"):
        fresh.load_state_dict({**state, "_extra_state": torch.zeros(3)})


def test_another_dtype_forgets_the_scale():
    _, example, prepared = calibrated("resnet")
    wide = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint16)], "nash-m")
    prepared.configure(wide)
    assert prepared.uncalibrated
    with pytest.raises(ModelError, match="never calibrated"):
        quantized(prepared, example)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_equal_and_independent(name):
    _, example, prepared = calibrated(name)
    before = quantized(prepared, example)
    twin = copy.deepcopy(prepared)
    assert equal(quantized(twin, example), before)
    perturb(twin)
    for quantizer in twin._quantizers():
        quantizer.set_scale(quantizer.scale * 1.3)
    assert equal(quantized(prepared, example), before)
    assert not equal(quantized(twin, example), before)
    assert {type(m) for m in twin.modules()} == {type(m) for m in prepared.modules()}
    kept = {p.data_ptr() for p in prepared.parameters()}
    assert not any(p.data_ptr() in kept for p in twin.parameters())


@pytest.mark.slow
def test_a_pickled_model_computes_the_same_in_another_process(tmp_path):
    _, example, prepared = calibrated("unet")
    expected = quantized(prepared, example)
    torch.save((prepared, example, expected), tmp_path / "model.pt")
    code = (
        "import sys, torch; prepared, example, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(), prepared.quantized():\n"
        "    got = list(prepared(example).values())\n"
        "assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)); assert prepared.ran\n"
        "prepared.train(); import copy; copy.deepcopy(prepared)(example)['map'].sum().backward()"
    )
    here = str(Path(__file__).parent.parent)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")]),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, env=env)


def test_train_and_eval_switch_as_in_the_float_model():
    model, example, prepared = calibrated("resnet")
    for mode in (True, False):
        prepared.train(mode), model.train(mode)
        assert all(m.training == mode for m in prepared.modules())
        assert equal(outputs(model, example), outputs(prepared, example))
        assert equal(model.buffers(), prepared.model.buffers())


def test_double_precision():
    model, example, prepared = calibrated("resnet", QDtype.qint16)
    reference = quantized(prepared, example)
    wide = quantized(copy.deepcopy(prepared).double(), example.double())
    assert wide[0].dtype == torch.float64
    assert equal(outputs(model.double(), example.double()), outputs(copy.deepcopy(prepared).double(), example.double()))
    assert torch.allclose(wide[0], reference[0].double(), atol=1e-3 * float(reference[0].abs().max()))
    assert equal(quantized(prepared.to("cpu"), example), reference)


def test_moving_to_another_device_takes_everything_along():
    _, _, prepared = calibrated("resnet")
    there = prepared.to("meta")  # any device: no tensor may stay behind
    assert {t.device.type for t in [*there.parameters(), *there.buffers()]} == {"meta"}


PASSED_ON = [("resnet", "eager"), ("unet", "eager"), ("attention", "aot_eager")]
"""The backend aot_eager takes the graph that eager runs, and every network is compiled for one of the two."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("attention", "eager"),
        ("resnet", "aot_eager"),
        ("unet", "aot_eager"),
        *(pytest.param(*pair, marks=pytest.mark.proof) for pair in PASSED_ON),
    ],
)
def test_a_compiled_model_computes_the_same(name, backend):
    _, example, prepared = calibrated(name)
    expected = quantized(prepared, example)
    torch._dynamo.reset()
    with prepared.quantized():
        compiled = torch.compile(prepared, backend=backend, fullgraph=True)
        assert equal(outputs(compiled, example), expected)


def loss(outputs, _):
    return outputs.square().mean()


def make():
    torch.manual_seed(0)
    example = torch.randn(4, 3, 16, 16)
    prepared = prepare(revive(ResNet()), example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, 2)]), qconfig, CalibrationSettings(method="minmax"))
    return prepared, example


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    gc.collect()  # as in test_ddp.py: no wrapper outlives the group
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["fuse_bn", "with_bn_reverse_fold"])
def test_distributed_training_is_training(one_process, mode):
    states = []
    for distributed in (True, False):
        prepared, example = make()
        settings = QatSettings(steps=3, mode=mode)
        optimizer = torch.optim.SGD(prepared.parameters(), 0.05)
        with qat_state(prepared, settings):  # the mode says which parameters DDP waits for
            model: nn.Module | None = DistributedDataParallel(prepared) if distributed else None
            report = train(prepared, [(example, None)] * 3, loss, optimizer, settings=settings, model=model)
        assert report.finished
        states.append(prepared.state_dict())
    assert equal(states[0].values(), states[1].values())
