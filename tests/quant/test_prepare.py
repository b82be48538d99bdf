import copy

import pytest
import torch
from support.models import Block, revive, zoo
from torch import nn

from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import DataError, ModelError
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.leaf import float_copy
from qflow.quant.model.prepare import prepare
from qflow.quant.model.verify import Observed
from qflow.quant.trace.calling import call_model, named_tensors

NAMES = list(zoo())


def stream(example, steps=3):
    return ((example, 2) for _ in range(steps))


def calibrated(name, dtype=QDtype.qint8, rules=None):
    model, example = zoo()[name]
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], "nash-m")
    if rules is not None:
        qconfig = apply_rules(prepared.graph, qconfig, rules)
    apply_scales(prepared, collect(prepared, stream(example)), qconfig, CalibrationSettings())
    return model, example, prepared


def outputs(model, inputs):
    with torch.no_grad():
        return [t for _, t in named_tensors(call_model(model, inputs))]


@pytest.mark.parametrize("name", NAMES)
def test_the_float_model_comes_out_of_a_prepared_one_with_its_own_classes(name):
    model, example, prepared = calibrated(name)
    found = float_copy(prepared.model)
    assert [type(module) for module in found.modules()] == [type(module) for module in model.modules()]
    assert prepare(found, example).graph.nodes == prepared.graph.nodes
    for a, b in zip(outputs(found, example), outputs(model, example), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_quantizers_off_is_the_float_model_bit_for_bit(name):
    model, example = zoo()[name]
    prepared = prepare(model, example)
    for inputs in (example, bigger(example)):
        observed = outputs(Observed(prepared.observed), inputs)  # every operator seen; `prepared` itself would see none
        for a, b, c in zip(outputs(model, inputs), outputs(prepared, inputs), observed, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
            assert a.abs().max() > 1e-3  # not vacuous


def bigger(example):
    if isinstance(example, dict):
        return {k: torch.cat([v, v * 0.5]) for k, v in example.items()}
    return torch.cat([example, example * 0.5])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [QDtype.qint8, QDtype.qint16])
def test_every_planned_quantizer_runs_and_int16_is_closer_than_int8(name, dtype, nash_m):
    model, example, prepared = calibrated(name, dtype, nash_m)
    with prepared.quantized():
        quantized = outputs(prepared, example)
    planned = {q.name for q in [*prepared.outputs.values(), *prepared.weights.values()] if q.dtype is not None}
    assert planned <= prepared.ran
    assert not prepared.unseen
    reference = outputs(model, example)
    assert all(torch.isfinite(t).all() for t in quantized)
    assert any(not torch.equal(a, b) for a, b in zip(reference, quantized, strict=True))


def noise(reference, got):
    pairs = zip(reference, got, strict=True)
    return sum(float((a.double() - b.double()).norm() / a.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_int16_activations_are_closer_than_int8(name):
    errors = {}
    for dtype in (QDtype.qint8, QDtype.qint16):
        model, example, prepared = calibrated(name, dtype)
        with prepared.only(
            outputs=[n.quantizer for n in prepared.graph.quantized if prepared.outputs[n.quantizer].dtype]
        ):
            errors[dtype] = noise(outputs(model, example), outputs(prepared, example))
    assert errors[QDtype.qint16] < 0.05 * errors[QDtype.qint8]


@pytest.mark.parametrize("name", NAMES)
def test_one_quantizer_alone_gives_what_it_gives_while_every_operator_is_followed(name):
    """With few quantizers on, only the functionals that they act on are followed, and attention stays undivided."""
    _, example, prepared = calibrated(name)
    for i, node in enumerate(n for n in prepared.graph.quantized if prepared.outputs[n.quantizer].dtype):
        weights = [node.weight] if node.weight in prepared.weights and i % 2 else []
        with prepared.only([] if weights else [node.quantizer], weights):
            found = outputs(prepared, example)
            assert prepared.ran == set(weights or [node.quantizer])
            prepared.watch = lambda name, value: None
            wanted = outputs(prepared, example)
            prepared.watch = None
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), node.name


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_folding_the_batch_norm_changes_nothing_but_the_rounding(name):
    """With the weight quantizer on a grid far below float noise, the folded model is the float model."""
    model, example = zoo()[name]
    model, example = model.double(), example.double()
    prepared = prepare(model, example)
    for quantizer in prepared.weights.values():
        quantizer.enabled, quantizer.dtype = True, QDtype.qint16
    with torch.no_grad():
        for quantizer in prepared.weights.values():
            quantizer.set_scale(torch.full_like(quantizer.scale, 1.0))
            quantizer.forward = lambda weight: weight  # identity grid: only the fold is left
        for a, b in zip(outputs(model, example), outputs(prepared, example), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert {q.name for q in prepared.weights.values()} <= prepared.ran


class Counted(nn.Module):
    """Counts its own calls, and those of its copies."""

    calls = 0

    def __init__(self, shift):
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.ones(4)) if shift else None

    def forward(self, x):
        Counted.calls += 1
        y = self.layer(x)
        return y if self.shift is None else y + self.shift.expand(len(x), 4)


@pytest.mark.parametrize(("constant", "most"), [(False, 4), (True, 5)])
def test_preparing_runs_the_model_at_most_five_times(constant, most):
    Counted.calls = 0
    prepare(Counted(constant).eval(), torch.randn(2, 4))
    # traced; with other values, if it holds constants; the copy at two batch sizes, the model at the other one
    assert Counted.calls == most


def test_the_float_model_is_left_as_it_was():
    model, example = zoo()["resnet"]
    before = copy.deepcopy(model.state_dict())
    calibrated("resnet")
    prepare(model, example)
    assert type(model.head) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_in_place_relu_is_seen_by_whoever_holds_the_tensor():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.conv(x) * 1.0
            z = self.relu(y)
            return y, z

    model = revive(Skip())
    example = torch.randn(2, 3, 4, 4)
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, stream(example)), qconfig, CalibrationSettings())
    with prepared.quantized():
        a, b = outputs(prepared, example)
    assert torch.equal(a, b)
    assert (a >= 0).all()


def test_switches_restore_and_refuse_unknown_names():
    _, example, prepared = calibrated("resnet")
    with pytest.raises(ModelError, match="nope"), prepared.only(outputs=["nope"]):
        pass
    with pytest.raises(ModelError, match="no name"), prepared.only():
        pass
    with pytest.raises(RuntimeError), prepared.quantized():
        prepared(torch.randn(2, 5, 8, 8))
    assert not any(q.enabled for q in prepared.outputs.values())
    with prepared.only(weights=["head"]):
        assert [q.name for q in prepared.weights.values() if q.enabled] == ["head"]
        outputs(prepared, example)
        assert prepared.ran == {"head"}


def test_a_copy_computes_the_same():
    _, example, prepared = calibrated("unet")
    twin = copy.deepcopy(prepared)
    with prepared.quantized(), twin.quantized():
        for a, b in zip(outputs(prepared, example), outputs(twin, example), strict=True):
            assert torch.equal(a, b)


def test_gradients_reach_every_weight_through_the_quantizers():
    _, example, prepared = calibrated("resnet")
    with prepared.quantized():
        prepared(example).square().sum().backward()
    grads = {n: p.grad for n, p in prepared.model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values())
    assert sum(float(g.abs().sum()) > 0 for g in grads.values()) >= len(grads) - 2


def test_a_quantizer_that_saw_only_zeros_stays_float_and_is_reported():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return torch.relu(self.conv(x) - 1e6) + x

    model = revive(Dead())
    example = torch.randn(2, 3, 4, 4)
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [TemplateSetter(QDtype.qint8)], "nash-m")
    findings = apply_scales(prepared, collect(prepared, stream(example)), qconfig, CalibrationSettings())
    assert any("[relu] was always zero" in finding for finding in findings)
    with prepared.quantized():
        assert torch.isfinite(outputs(prepared, example)[0]).all()


def test_what_cannot_be_prepared_is_refused_in_a_sentence():
    model, example = zoo()["resnet"]
    with pytest.raises(ModelError, match=r"Call model.eval\(\) first"):
        prepare(copy.deepcopy(model).train(), example)
    with pytest.raises(ModelError, match="must run on a batch of its data, but got"):
        prepare(model, torch.randn(2, 7, 8, 8))

    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(ModelError, match="deterministic in eval mode"):
        prepare(Noisy().eval(), torch.randn(2, 3))


def test_an_empty_calibration_set_and_infinite_values_are_refused():
    model, example = zoo()["resnet"]
    prepared = prepare(model, example)
    with pytest.raises(DataError, match="empty calibration set"):
        collect(prepared, iter(()))
    with pytest.raises(DataError, match=r"but got nan at"):
        collect(prepared, [(torch.full((1, 3, 16, 16), float("inf")), 1)])
    assert prepared._collect is None


def test_a_block_called_in_two_places_keeps_its_names_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(4)

        def forward(self, x):
            return self.block(self.block(x))

    model = revive(Twice())
    prepared = prepare(model, torch.randn(2, 4, 8, 8))
    names = [n.name for n in prepared.graph.nodes]
    assert "block.conv1(1)" in names
    assert "block[add](1)" in names


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [QDtype.qint8, QDtype.qint16])
def test_the_clamp_of_a_relu_is_that_of_its_quantizer(kind, inplace, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), kind(inplace=inplace), nn.Conv2d(8, 2, 1)).eval()
    example = torch.randn(4, 3, 9, 9) * 8
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [TemplateSetter(dtype)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, 4)]), qconfig, CalibrationSettings(method="percentile"))
    with prepared.quantized():
        with torch.no_grad():
            fast = prepared(example)
        assert torch.equal(fast, prepared(example).detach())  # with gradients the ReLU runs on its own
