"""QAT from Python: `qflow.train`, the plugin's QAT state for a loop of one's own, its modes and its check."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import qflow
from qflow.core.errors import ConfigError, ModelError, QflowError


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(784, 4)
    ).eval()


def batches(count=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8 * count, 3, 16, 16, generator=generator) + 0.5
    return DataLoader(TensorDataset(images, (images.mean((1, 2, 3)) * 20).long().clamp(0, 3)), batch_size=8)


def loss(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


@pytest.fixture
def mode():
    """The QAT mode is the process's: it is set back after the test."""
    before = qflow.get_qat_mode()
    yield qflow.set_qat_mode
    qflow.set_qat_mode(before)


def calibrated(setter=qflow.default_qat_qconfig_setter):
    images = next(iter(batches()))[0]
    prepared = qflow.prepare(net(), images, setter)
    qflow.calibrate(prepared, batches())
    return prepared


def test_a_model_trains_and_quantizes_afterwards():
    prepared, images = calibrated(), next(iter(batches()))[0]
    before, scales = {k: v.clone() for k, v in prepared.float_state_dict().items()}, qflow.scales(prepared)
    report = qflow.train(prepared, batches(), loss, steps=12, learning_rate=3e-3, float_steps=100)
    assert (report.steps, report.finished, report.findings) == (12, True, ())
    assert sum(report.losses[-4:]) < sum(report.losses[:4])
    assert report.learning_rates == (3e-3,) * 12
    after = prepared.float_state_dict()
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["1.running_mean"], before["1.running_mean"])  # FuseBN
    assert qflow.scales(prepared) != scales
    assert not [f for f in qflow.check(prepared).findings if "calibrate again" in f.message]
    with torch.no_grad():
        quantized = prepared(images)
        qflow.set_fake_quantize(prepared, qflow.FakeQuantState.FLOAT)
        assert not prepared.training and not torch.equal(quantized, prepared(images))


def test_settings_come_as_a_record_or_by_name_and_the_same_seed_gives_the_same_numbers():
    states = []
    for settings, changes in (
        (qflow.QatSettings(steps=3, rates={"5": 1e-2}, freeze=("0",)), {}),
        (None, {"steps": 3, "rates": {"5": 1e-2}, "freeze": ("0",)}),
        (qflow.QatSettings(steps=9, rates={"5": 1e-2}), {"steps": 3, "freeze": ("0",)}),
    ):
        prepared = calibrated()
        frozen = prepared.float_state_dict()["0.weight"].clone()
        report = qflow.train(prepared, batches(), loss, settings=settings, **changes)
        states.append((report.losses, prepared.state_dict()))
        assert torch.equal(prepared.float_state_dict()["0.weight"], frozen)
        assert "qat.float_steps=<n>" in report.findings[-1]
    for losses, state in states[1:]:
        assert losses == states[0][0]
        assert all(torch.equal(v, states[0][1][k]) for k, v in state.items() if isinstance(v, torch.Tensor))


def test_without_a_loss_the_float_model_teaches():
    images = [(images,) for images, _ in batches()]  # no labels
    states = []
    for teacher in (None, net()):
        prepared = calibrated()
        report = qflow.train(
            prepared, images, steps=12, learning_rate=1e-5, float_steps=100,
            teacher={"weight": 1.0}, ema=0.5, learned_scales=10.0, float_model=teacher,
        )  # fmt: skip
        assert report.losses[-1] < report.losses[0]
        assert not report.findings
        states.append(prepared.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(ConfigError, match=r"QAT needs a loss, but got none.*qat.teacher.weight=1"):
        qflow.train(calibrated(), images, steps=1)


def test_rates_of_modules_keep_their_ratio_to_another_learning_rate():
    known = qflow.QatSettings(steps=1, learning_rate=1e-3, rates={"5": 1e-2})
    made = []

    def optimizer(groups, lr):
        made.append({group["name"]: group["lr"] for group in groups})
        return torch.optim.AdamW(groups, lr=lr)

    for changes in ({}, {"learning_rate": 1e-5}, {"learning_rate": 1e-5, "rates": {"5": 0.5}}):
        qflow.train(calibrated(), batches(), loss, optimizer=optimizer, settings=known, **changes)
    rates = [{name: group[name] for name in ("", "5")} for group in made]
    seen = [rate for i, rate in enumerate(rates) if rate not in rates[:i]]
    assert seen == [{"": 1e-3, "5": 1e-2}, {"": 1e-5, "5": 1e-4}, {"": 1e-5, "5": 0.5}]


@pytest.mark.parametrize("name", ["FuseBN", "WithBN", "WithBNReverseFold"])
def test_the_mode_that_was_set_before_prepare_decides_about_the_batch_norms(name, mode):
    mode(qflow.QATMode[name])
    prepared = calibrated()
    mode(qflow.QATMode.FuseBN)  # a later change is for later models
    assert prepared.qat_mode == qflow.QATMode[name]
    mean = prepared.float_state_dict()["1.running_mean"].clone()
    gamma = prepared.float_state_dict()["1.weight"].clone()
    qflow.train(prepared, batches(), loss, steps=4, learning_rate=1e-2)
    kept = torch.equal(prepared.float_state_dict()["1.running_mean"], mean)
    assert kept == torch.equal(prepared.float_state_dict()["1.weight"], gamma) == (name == "FuseBN")


def test_modes_are_the_plugins_values(mode):
    mode("with_bn")
    assert qflow.get_qat_mode() is qflow.QATMode.WithBN
    with pytest.raises(ConfigError, match=r"QATMode.FuseBN, QATMode.WithBN, .* but got 'bn'"):
        mode("bn")


@pytest.mark.parametrize("name", ["FuseBN", "WithBN"])
def test_a_loop_of_ones_own_in_the_qat_state_is_the_training_of_qflow(name, mode):
    mode(qflow.QATMode[name])
    own, ours = calibrated(), calibrated()
    report = qflow.train(ours, batches(), loss, steps=4, learning_rate=1e-2, optimizer=torch.optim.SGD)
    qflow.set_fake_quantize(own, qflow.FakeQuantState.QAT)
    assert own.training
    optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        value = loss(own(batch[0]), batch)
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    ema = copy.deepcopy(own)
    own.eval()
    qflow.set_fake_quantize(own, qflow.FakeQuantState.VALIDATION)
    assert tuple(losses) == report.losses
    assert qflow.scales(own) == qflow.scales(ours)
    images = next(iter(batches()))[0]
    with torch.no_grad():
        assert torch.equal(own(images), ours(images))
        assert torch.isfinite(ema.eval()(images)).all()


def test_scales_that_the_qconfig_keeps_do_not_move():
    prepared = calibrated(qflow.default_qat_fixed_act_qconfig_setter)
    kept = {k: v for k, v in qflow.scales(prepared).items() if not k.endswith(".weight")}
    qflow.train(prepared, batches(seed=3), loss, steps=3, learning_rate=1e-2)
    assert {k: v for k, v in qflow.scales(prepared).items() if k in kept} == kept


REFUSED = {
    "warm-up": (
        {"scheduler": schedules.LinearLR},
        "no warm-up, but got",
    ),
    "no steps": ({"steps": 0}, "got steps=0. Write steps=500"),
    "unknown": ({"epochs": 3}, "qflow.train has the settings steps, .* but got epochs"),
    "made": ({"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)}, "one that is made already"),
    "value": ({"learning_rate": -1.0}, "qat.learning_rate lies between"),
    "module": ({"rates": {"nowhere": 0.1}}, "qat.rates names modules, but got 'nowhere'"),
    "all frozen": ({"freeze": ("0", "1", "3", "5")}, "which covers them all"),
    "mode": ({"mode": "often"}, "qat.mode is one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_train_is_refused_in_one_line(case):
    changes, says = REFUSED[case]
    prepared = calibrated()
    with pytest.raises(QflowError, match=says) as caught:
        qflow.train(prepared, batches(), loss, **{"steps": 5, **changes})
    assert "\n" not in str(caught.value)
    assert not prepared.training


def test_training_starts_from_a_calibration():
    prepared = qflow.prepare(net(), next(iter(batches()))[0])
    for start in (
        lambda: qflow.train(prepared, batches(), loss, steps=3),
        lambda: qflow.set_fake_quantize(prepared, qflow.FakeQuantState.QAT),
    ):
        with pytest.raises(ModelError, match="Call qflow.calibrate first"):
            start()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, left, *, right):
        return self.a(left) + self.b(right)


def test_prepare_takes_the_plugins_arguments():
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    model = Two().eval()
    prepared = qflow.prepare(model, x, method=qflow.PrepareMethod.JIT_STRIP, example_kw_inputs={"right": y})
    qflow.set_fake_quantize(prepared, qflow.FakeQuantState.FLOAT)
    with torch.no_grad():
        assert torch.equal(prepared(x, right=y), model(x, right=y))
    for method in ("eager", qflow.PrepareMethod.SYMBOLIC):
        with pytest.raises(ConfigError, match=r"traces a run of the example inputs, but got PrepareMethod\."):
            qflow.prepare(model, x, method=method, example_kw_inputs={"right": y})
    with pytest.raises(ConfigError, match="PrepareMethod.EAGER, .* but got 'fx'"):
        qflow.prepare(model, x, method="fx")
    with pytest.raises(ConfigError, match="needs example inputs, but got none"):
        qflow.prepare(model)
    with pytest.raises(ConfigError, match="arguments of forward, but got .*wrong"):
        qflow.prepare(model, x, example_kw_inputs={"wrong": y})


def test_the_plugins_check_writes_its_file_and_finds_what_the_trace_did_not_reach(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x * 2.0 if float(x.sum()) > 0 else torch.tanh(x)

    prepared = qflow.prepare(Branches().eval(), torch.ones(2, 3))
    assert not [f for f in qflow.check_qat_model(prepared).findings if "not while the model was traced" in f.message]
    found = qflow.check_qat_model(prepared, -torch.ones(2, 3), save_results=True, out_dir=tmp_path)
    assert [f for f in found.findings if "not while the model was traced" in f.message]
    assert "Each layer out qconfig:" in (tmp_path / "model_check_result.txt").read_text()
    with pytest.raises(ConfigError, match="checked after qflow.prepare, but got Branches"):
        qflow.check_qat_model(Branches())
