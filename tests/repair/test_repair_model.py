"""`qflow.repair_model` as a library call: what comes back, what is left alone, what is saved."""

import copy

import pytest
import torch
from support.models import revive
from support.rescaled import ResNet20, rescaled
from support.temporal import FromNone, frames, made

import qflow
from qflow.core.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def loader():
    torch.manual_seed(1)
    return [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)) for _ in range(5)]


def hard():
    torch.manual_seed(0)
    return rescaled(revive(ResNet20()), decades=2.0)


@pytest.fixture(scope="module")
def repaired(loader):
    model = hard()
    prepared = qflow.prepare(model, loader[0])
    before = copy.deepcopy(model.state_dict())
    found, table = qflow.repair_model(prepared, loader)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.float_state_dict().items())
    assert prepared.uncalibrated and prepared.stats is None
    return found, table


def test_a_repaired_model_is_calibrated_and_quantizes(repaired, loader):
    found, table = repaired
    images = loader[0][0]
    assert table.after < table.before / 3
    assert not found.uncalibrated and found.stats.samples == 20 and not qflow.check(found).errors
    with torch.no_grad():
        wanted = hard()(images)
        got = found(images)
        qflow.set_fake_quantize(found, qflow.FakeQuantState.FLOAT)
        same = found(images)
        qflow.set_fake_quantize(found, qflow.FakeQuantState.VALIDATION)
    assert 0 < float((got - wanted).norm() / wanted.norm()) < 0.05
    assert float((same - wanted).norm() / wanted.norm()) < 1e-5


def test_the_repaired_weights_are_the_float_state_and_are_saved(repaired, loader):
    found, _ = repaired
    images = loader[1][0]
    model = hard()
    model.load_state_dict(found.float_state_dict())
    assert not torch.equal(model.blocks[1].conv2.weight, hard().blocks[1].conv2.weight)
    other = qflow.prepare(hard(), loader[0])
    other.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), found(images))
    again = qflow.prepare(model, loader[0])
    qflow.calibrate(again, loader)
    with torch.no_grad():
        assert torch.equal(again(images), found(images)), "the scales are those of a calibration of the new weights"


def test_another_mix_and_a_training_start_from_the_repaired_model(repaired, loader):
    found = copy.deepcopy(repaired[0])
    qflow.configure(found, (qflow.HighPrecisionOutput(), qflow.TemplateSetter("qint16")))
    with torch.no_grad():
        wanted, got = hard()(loader[0][0]), found(loader[0][0])
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
    qflow.set_fake_quantize(found, qflow.FakeQuantState.QAT)
    with pytest.raises(ModelError, match="eval mode, but got one in train mode. Repair it before QAT"):
        qflow.repair_model(found, loader)


def test_the_same_data_give_the_same_repair(repaired, loader):
    again, table = qflow.repair_model(qflow.prepare(hard(), loader[0]), loader)
    assert table == repaired[1]
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in repaired[0].state_dict().items())


def test_a_step_that_nobody_knows_is_refused(loader):
    prepared = qflow.prepare(hard(), loader[0])
    with pytest.raises(ConfigError, match="A repair step is one of equalize, .*, bias, but got 'polish'"):
        qflow.repair_model(prepared, loader, steps=["polish"])
    found, table = qflow.repair_model(prepared, loader, steps=[])
    assert table.rows == () and not found.uncalibrated


def test_a_model_with_temporal_state_is_refused():
    items = frames(FromNone, 6)
    prepared = qflow.prepare(made(FromNone), items[0], cached_attrs="state")
    with pytest.raises(ConfigError, match=r"temporal state \(cached_attrs\). Calibrate it without a repair"):
        qflow.repair_model(prepared, items)
    assert qflow.calibrate(prepared, items) is not None
