"""Reconstruction: learned codes lower the error on samples that no step has seen, and stay on the grid of int8."""

import copy

import pytest
import torch
from support.models import zoo
from support.rounding import SETTINGS, all_at, calibrated, error, quantized_weights, recalibrate
from support.zoo import build
from torch import nn

from qflow.quant.model.leaf import float_copy
from qflow.quant.model.prepare import prepare
from qflow.quant.trace.calling import batch_size
from qflow.repair.base.contract import KEPT, REFUSED, UNDONE, Context
from qflow.repair.run import repair
from qflow.repair.weights import reconstruction, walk
from qflow.repair.weights.bias import FloatOutputs
from qflow.repair.weights.learned_codes import LearnedCodes
from qflow.repair.weights.reconstruction import reconstruct
from qflow.repair.weights.regions import regions_of
from qflow.repair.weights.rounding import round_weights
from qflow.repair.weights.walk import Walk, samples_of
from qflow.repair.weights.weight_steps import Reconstruction, Reference, Rounding
from qflow.tasks.digits import build_data, build_model


@pytest.fixture(scope="module")
def digits():
    data = build_data()
    return build_model(), [data.calibration.tensors[0][i : i + 32] for i in (0, 32, 64)], data.evaluation.tensors[0]


@pytest.fixture
def brief(monkeypatch):
    """Few iterations, for what does not depend on how good the codes get."""
    monkeypatch.setattr(reconstruction, "ITERATIONS", 40)


def sized(batches):
    return [(batch, batch_size(batch)) for batch in batches]


def learned(prepared, batches, bits=8, **options):
    """The codes of second-order rounding, and what reconstruction makes of them."""
    model = float_copy(prepared.model)
    round_weights(prepared, batches, bits=bits)
    samples = samples_of(model, prepared, sized(batches))
    regions, _ = regions_of(samples.chunks[0].ops, prepared.weights)
    return reconstruct(prepared, model, samples.chunks, regions, bits=bits, **options)


def residual(seed=0):
    torch.manual_seed(seed)
    return zoo()["resnet"][0], [torch.randn(8, 3, 16, 16) for _ in range(2)]


# ---- what is learned


@pytest.mark.slow
@pytest.mark.parametrize("bits", [6, 5])
def test_it_goes_on_from_second_order_rounding(digits, bits):
    model, fit, held = digits
    rounded, repaired = calibrated(model, fit), calibrated(model, fit)
    round_weights(rounded, fit, bits=bits)
    found, _ = learned(repaired, fit, bits)
    recalibrate(repaired, fit)
    assert error(repaired, model, held) < 0.9 * error(rounded, model, held)
    assert all(one.after < one.before for one in found.values())


def test_a_layer_whose_error_comes_from_its_inputs_is_left_alone(digits, monkeypatch):
    model, fit, _ = digits
    monkeypatch.setattr(reconstruction, "LEFT", 1e9)
    prepared = calibrated(model, fit)
    found, forwards = learned(prepared, fit)
    assert found == {}
    assert 0 < forwards < 6 * 96  # two passes, and a few looks at the samples that decide


def test_training_stops_when_nothing_can_be_gained(digits, monkeypatch):
    """With a learning rate that throws weights about, no weight between two codes is as good as the codes."""
    model, fit, _ = digits
    monkeypatch.setattr(reconstruction, "RATE", 1e3)
    calls = []
    monkeypatch.setattr(torch.optim.Adam, "step", spied(torch.optim.Adam.step, calls))
    found, _ = learned(calibrated(model, fit), fit, bits=5)
    assert found == {}
    looks = reconstruction.LOOK * reconstruction.PATIENCE
    assert len(calls) in (looks, 2 * looks, 3 * looks, 4 * looks)


def spied(function, calls):
    def step(self, *args, **kwargs):
        calls.append(1)
        return function(self, *args, **kwargs)

    return step


def test_codes_start_between_the_present_one_and_the_float_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    prepared = calibrated(model, [torch.randn(8, 6)])
    leaf, quantizer = dict(prepared.model.named_modules())["0"], prepared.weights["0"]
    codes = LearnedCodes(leaf, quantizer, model[0].weight)
    assert torch.equal(codes.hard(), codes.codes)
    exact = model[0].weight.detach() / quantizer.scale
    soft = codes.soft()[0].detach() / quantizer.scale
    gap = (soft - exact).abs()
    assert (gap <= (codes.codes[0] - exact).abs() + 0.03).all()
    assert codes.undecided(2.0) < codes.undecided(20.0)
    with torch.no_grad():
        codes.v.fill_(10.0)
    assert float(codes.undecided(2.0).detach()) == 0.0


# ---- what it leaves


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "vision_transformer", "unet"])
def test_weights_are_on_the_grid_and_stay_there(kind, brief):
    model, example = build(kind)
    prepared = calibrated(model, [example, example])
    scales = {name: quantizer.scale.clone() for name, quantizer in prepared.weights.items()}
    learned(prepared, [example, example], bits=5)
    names = list(scales)
    codes = quantized_weights(prepared, names, example)
    modules = dict(prepared.model.named_modules())
    for name in names:
        steps = codes[name] / scales[name]
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        size = modules[name].folded()[0].abs()
        rest = size < size.amax(dim=[d for d in range(size.ndim) if scales[name].shape[d] == 1], keepdim=True)
        exact = (modules[name].folded()[0] / scales[name])[rest]
        torch.testing.assert_close(exact, exact.round(), rtol=0, atol=1e-2)
        assert (exact.round() % 8 == 0).all()  # every eighth code: 5 bits
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(prepared.model.state_dict())
    again = quantized_weights(calibrated(loaded, [example, example]), names, example)
    assert all(((again[name] - codes[name]) / scales[name]).abs().max() < 0.01 for name in names)


def test_it_is_the_same_again_and_touches_nothing_else(brief):
    model, fit = residual()
    one, two = calibrated(model, fit), calibrated(model, fit)
    for parameter in one.model.parameters():
        parameter.requires_grad_(False)
    before, random = copy.deepcopy(one.model.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        first, _ = learned(one, fit, bits=5)
    torch.manual_seed(7)
    after = torch.get_rng_state()
    second, _ = learned(two, fit, bits=5)
    assert torch.equal(torch.get_rng_state(), after)
    assert first.keys() == second.keys() != set()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    torch.set_rng_state(random)
    changed = {key for key, value in one.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed <= {f"{name}.weight" for name in one.weights}
    assert not any(parameter.requires_grad for parameter in one.model.parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in two.model.parameters())
    assert not any(module.training for module in one.model.modules())
    other, _ = learned(calibrated(model, fit), fit, bits=5, seed=1)
    assert any(str(other.get(name)) != str(first[name]) for name in first)


# ---- memory and cost


def test_samples_beyond_the_memory_are_left_out_and_the_table_says_so(digits, brief, monkeypatch):
    model, fit, _ = digits
    held = []
    advance = Walk.advance

    def counted(self, *args):
        advance(self, *args)
        held.append(sum(chunk.bytes for chunk in self.chunks))

    monkeypatch.setattr(Walk, "advance", counted)
    prepared = calibrated(model, fit)
    context = Context(sized(fit), all_at(prepared), SETTINGS)
    step = Reconstruction(Reference(FloatOutputs))
    assert step.needs(prepared, context) == ""
    one = max(held)
    held.clear()
    monkeypatch.setattr(walk, "MEMORY", 5 * one)
    assert step.needs(prepared, context) == ""
    monkeypatch.setattr(reconstruction, "LEFT", 0.0)
    held.clear()
    parts, _ = step.parts(prepared, context)
    changed = step.apply(prepared, context, parts)
    assert 2 * one <= max(held) <= 5 * one
    assert changed
    assert all("of 96 samples: more exceed" in text for text in changed.values())
    monkeypatch.setattr(walk, "MEMORY", one)
    assert "two chunks of 16 samples" in step.needs(prepared, context)


def test_forward_passes_are_counted_by_their_multiplications(digits, brief, monkeypatch):
    """All layers together: three times the samples of each iteration, two passes, and what is looked at."""
    model, fit, _ = digits
    monkeypatch.setattr(reconstruction, "LEFT", 0.0)
    _, forwards = learned(calibrated(model, fit), fit)
    trained = 3 * 16 * reconstruction.ITERATIONS
    assert trained + 2 * 96 < forwards < trained + 12 * 96


# ---- the step


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.one(x)
        return self.two(y) if float(y.mean()) > -100 else y


def test_control_flow_on_values_is_refused_with_the_reason():
    model, fit = Branching().eval(), [torch.randn(16, 4)]
    prepared = prepare(model, fit[0])
    _, _, table = repair(prepared, sized(fit), all_at(prepared), SETTINGS, [Reconstruction(Reference(FloatOutputs))])
    assert "a Python value is taken from [mean]" in table.rows[0].reason


@pytest.mark.slow
def test_the_step_is_judged_on_held_out_samples_and_says_what_it_did(digits):
    model, fit, held = digits
    prepared, reference = prepare(model, fit[0]), Reference(FloatOutputs)
    steps = [Rounding(reference), Reconstruction(reference)]
    repaired, _, table = repair(prepared, sized(fit), all_at(prepared), SETTINGS, steps)
    rows = [row for row in table.rows if row.step == "reconstruction"]
    assert {row.verdict for row in rows} <= {KEPT, UNDONE, REFUSED}
    assert any(row.changed for row in rows)
    assert table.after <= table.before
    assert all("error of its output" in text and "iterations" in text for row in rows for text in row.changed.values())
    recalibrate(prepared, fit)
    assert error(repaired, model, held) < error(prepared, model, held)


def test_a_later_attempt_takes_the_codes_that_were_found(brief):
    model, fit = residual()
    prepared = calibrated(model, fit)
    context = Context(sized(fit), all_at(prepared), SETTINGS)
    step = Reconstruction(Reference(FloatOutputs))
    assert step.needs(prepared, context) == ""
    parts, _ = step.parts(prepared, context)
    before = copy.deepcopy(prepared.model.state_dict())
    whole = step.apply(prepared, context, parts)
    after, spent = copy.deepcopy(prepared.model.state_dict()), context.forwards
    prepared.model.load_state_dict(before)
    name = next(iter(whole))
    half = step.apply(prepared, context, [part for part in parts if part.name == name])
    assert half == {name: whole[name]}
    assert context.forwards == spent
    changed = {key for key, value in prepared.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all(torch.equal(prepared.model.state_dict()[key], after[key]) for key in changed)


def test_values_are_read_in_float_half_of_the_time_when_quantizers_are_dropped():
    model, fit = residual()
    prepared = calibrated(model, fit)
    samples = samples_of(float_copy(prepared.model), prepared, sized(fit))
    region = next(r for r in regions_of(samples.chunks[0].ops, prepared.weights)[0] if r.layers)
    chunk = samples.chunks[0]
    with prepared.quantized():
        both = Walk(prepared, samples.chunks)
        both.advance(region.start, region.end + 1)
        target = chunk.plain[region.end][0]
        quantized = both.result(chunk, region, {})
        dropped = [both.result(chunk, region, {}, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    assert (dropped[0] - target).norm() < (quantized - target).norm()
