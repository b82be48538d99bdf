"""A repair keeps a step where held-out samples say so, takes it back where not, and tells all of it."""

import pytest
import torch
from support.models import ResNet, Wide, revive
from torch import nn

import qflow
from qflow.core.errors import DataError
from qflow.repair.base.contract import Part, Step
from qflow.repair.base.measure import judged
from qflow.repair.run import held_out, repair


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    return qflow.prepare(revive(ResNet()), torch.randn(2, 3, 16, 16))


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(1)
    return [(torch.randn(4, 3, 16, 16), 4) for _ in range(4)]


class Spoils(Step):
    """Halves the first weight, which no quantizer asked for."""

    name = "spoil"

    def parts(self, prepared, context):
        return [Part("stem.0"), Part("head")], {"blocks.0.conv1": "it is too small"}

    def apply(self, prepared, context, parts):
        with torch.no_grad():
            for part in parts:
                prepared.model.get_submodule(part.name).weight.mul_(0.5)
        return {part.name: "halved" for part in parts}


def run(prepared, batches, *steps):
    return repair(prepared, batches, prepared.applied, prepared.settings, steps)


def test_a_step_that_does_harm_is_taken_back_whole_and_in_halves(prepared, batches):
    float_before = {name: tensor.clone() for name, tensor in prepared.float_state_dict().items()}
    model, context, table = run(prepared, batches, Spoils())
    assert [(row.parts, row.verdict) for row in table.rows] == [
        (("stem.0", "head"), "undone"),
        (("stem.0",), "undone"),
        (("head",), "undone"),
        (("blocks.0.conv1",), "refused"),
    ]
    assert table.after == table.before and table.held_out == 4 and table.samples == 12
    assert all(row.change > 0 and row.reason == "worse" for row in table.rows[:3])
    for state in (model.float_state_dict(), prepared.float_state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in float_before.items())
    assert context.forwards == table.forwards > sum(row.forwards for row in table.rows)
    assert prepared.uncalibrated and not model.uncalibrated, "the model given is left as it was"


class Fails(Spoils):
    """Changes weights, then fails, as the backward pass of a user's model may."""

    name = "fail"

    def apply(self, prepared, context, parts):
        super().apply(prepared, context, parts)
        raise RuntimeError("a leaf Variable that requires grad is being used\nin an in-place operation")


def test_a_step_that_fails_is_taken_back_and_refused_with_its_error(prepared, batches):
    model, _, table = run(prepared, batches, Fails(), Spoils())
    first, *rest = table.rows
    assert (first.step, first.verdict) == ("fail", "refused")
    assert first.reason.startswith("it failed: RuntimeError: a leaf Variable that requires grad is being used in an")
    assert [row.verdict for row in rest] == ["undone", "undone", "undone", "refused"], "the next step is tried as usual"
    assert all(torch.equal(model.float_state_dict()[n], t) for n, t in prepared.float_state_dict().items())


def test_without_steps_the_copy_is_calibrated_as_by_the_library(prepared, batches):
    model, _, table = run(prepared, batches)
    torch.manual_seed(0)
    other = qflow.prepare(revive(ResNet()), batches[0][0])
    qflow.calibrate(other, [inputs for inputs, _ in batches])
    assert table.rows == () and table.after == table.before
    assert all(torch.equal(q.scale, other.outputs[name].scale) for name, q in model.outputs.items())


def test_one_sample_in_four_decides_whatever_the_batches_are():
    for sizes in ([1] * 9, [3, 3, 3], [9], [2, 7]):
        samples = torch.arange(9.0).view(9, 1).split(sizes)
        fit, held = held_out([(part, len(part)) for part in samples])
        assert sum(size for _, size in held) == 2 and sum(size for _, size in fit) == 7
        assert sorted(torch.cat([part for part, _ in [*fit, *held]]).flatten().tolist()) == list(range(9))
        assert all(len(part) == size for part, size in [*fit, *held])
    with pytest.raises(DataError, match="4 calibration samples or more, but got 3"):
        held_out([(torch.zeros(3, 1), 3)])


def test_the_verdict_goes_by_the_paired_noise():
    before = torch.tensor([0.1, 0.5, 0.9, 2.0], dtype=torch.float64)
    assert judged(before, before - 0.05, preserving=False).keep, "small, but the same on every sample"
    wild = before + torch.tensor([-0.4, 0.3, -0.3, 0.3])
    assert not judged(before, wild, preserving=False).keep
    assert judged(before, wild, preserving=False).reason == "better by less than the noise"
    assert not judged(before, before, preserving=True).keep
    calmer = before + torch.tensor([0.3, 0.2, 0.1, -0.9])
    assert judged(before, calmer, preserving=True).keep and not judged(before, calmer, preserving=False).keep
    assert not judged(before, before.clone().fill_(float("nan")), preserving=True).keep


class Quietens(Step):
    """Switches the loud channel off, which no output reads, and shifts the result by `shift`."""

    name = "quieten"
    preserving = True

    def __init__(self, shift):
        self.shift = shift

    def parts(self, prepared, context):
        return [Part("loud")], {}

    def apply(self, prepared, context, parts):
        with torch.no_grad():
            prepared.model.loud.weight[0] = 0.0
            prepared.model.quiet.bias += self.shift
        return {"loud": "off"}


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, "kept"), (1e-3, "undone")])
def test_a_step_is_kept_as_preserving_only_if_the_float_function_stays(shift, verdict):
    torch.manual_seed(0)
    prepared = qflow.prepare(Wide(nn.Conv2d(1, 2, 3)).eval(), torch.randn(2, 1, 8, 8))
    _, _, table = run(prepared, [(torch.randn(8, 1, 8, 8), 8) for _ in range(2)], Quietens(shift))
    (row,) = table.rows
    assert row.verdict == verdict and row.after < row.before / 10
    assert ("the float function moved by" in row.reason) == (verdict == "undone")


def test_the_table_shows_itself(prepared, batches):
    _, _, table = run(prepared, batches, Spoils())
    assert repr(table).startswith("<RepairTable: 0 of 4 repairs kept: error of the outputs 0.0")
    assert "it is too small" in table._repr_html_()
