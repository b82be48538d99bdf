import dataclasses
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from support.models import ResNet, revive
from support.training import calibrated, data, loss, same, sgd, small

from qflow.config.schema import QatSchema, TeacherSchema
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError, ModelError, TrialError
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import NORM_MODES, QatSettings
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.qat import train
from qflow.quant.train.report import DivergedError


@pytest.mark.parametrize("mode", NORM_MODES)
def test_training_lowers_the_loss_moves_scales_and_ends_in_eval_mode(mode):
    prepared = small()
    before = {n: float(q.scale) for n, q in prepared.outputs.items()}
    report = train(prepared, list(data()), loss, sgd(prepared), settings=QatSettings(steps=24, mode=mode))
    assert report.finished and report.steps == 24 and report.seconds > 0 and not report.findings
    assert sum(report.losses[-4:]) < 0.8 * sum(report.losses[:4])
    assert report.learning_rates == (0.02,) * 24  # fixed, no warm-up
    assert sum(float(q.scale) != before[n] for n, q in prepared.outputs.items()) > len(before) / 2
    assert not any(m.training for m in prepared.modules())
    assert not any(q.enabled or q.averaging_constant for q in prepared.outputs.values())
    for path, quantizer in prepared.weights.items():  # of the last weights, not of the step before
        leaf = prepared.model.get_submodule(path)
        assert torch.equal(quantizer.scale, quantizer.measured(leaf.folded()[0]))
    assert all(p.requires_grad for p in prepared.model.parameters())


def test_scales_stay_where_they_are_asked_to():
    prepared, qconfig = calibrated(revive(ResNet()), torch.randn(4, 3, 16, 16))
    names = [n.name for n in prepared.graph.quantized if prepared.outputs[n.quantizer].dtype]
    ops = dict(qconfig.ops)
    ops[names[0]] = dataclasses.replace(ops[names[0]], frozen=True)
    ops[names[1]] = dataclasses.replace(ops[names[1]], fixed_scale=0.5)
    pinned = dataclasses.replace(qconfig, ops=ops)
    before = {n: float(q.scale) for n, q in prepared.outputs.items()}
    train(prepared, data(), loss, sgd(prepared), settings=QatSettings(steps=2), qconfig=pinned)
    moved = {n for n, q in prepared.outputs.items() if float(q.scale) != before[n]}
    quantizer_of = {n.name: n.quantizer for n in prepared.graph.quantized}
    assert moved and not moved & {quantizer_of[names[0]], quantizer_of[names[1]]}
    before = {n: q.scale.clone() for n, q in {**prepared.outputs, **prepared.weights}.items()}
    train(prepared, data(), loss, sgd(prepared), settings=QatSettings(steps=2, moving=False, moving_weights=False))
    assert all(torch.equal(before[n], q.scale) for n, q in {**prepared.outputs, **prepared.weights}.items())


def test_the_calibrated_qconfig_is_the_one_that_trains():
    prepared, qconfig = calibrated(revive(ResNet()), torch.randn(4, 3, 16, 16))
    other = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint16)], "nash-m")
    with pytest.raises(ModelError, match="same qconfig, but got qint8 at .* where the qconfig says qint16"):
        train(prepared, data(), loss, sgd(prepared), settings=QatSettings(steps=1), qconfig=other)
    assert other.march == qconfig.march


def test_frozen_modules_stand_still():
    prepared = small()
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    settings = QatSettings(steps=3, mode="with_bn", freeze=("stem", "blocks.0"))
    train(prepared, data(), loss, sgd(prepared), settings=settings)
    changed = {k for k, v in prepared.model.state_dict().items() if not torch.equal(v, before[f"model.{k}"])}
    assert not any(k.startswith(("stem.", "blocks.0.")) for k in changed)
    assert {"blocks.1.conv1.weight", "blocks.1.bn1.running_mean", "head.weight"} <= changed
    assert torch.equal(prepared.weights["stem.0"].scale, before[scale_key(prepared, prepared.weights["stem.0"])])
    with pytest.raises(ConfigError, match="qat.freeze names modules, but got 'steem'"):
        train(prepared, data(), loss, sgd(prepared), settings=QatSettings(steps=1, freeze=("steem",)))


def scale_key(prepared, quantizer):
    return next(f"{n}.scale" for n, m in prepared.named_modules() if m is quantizer)


def test_parameter_groups_take_the_longest_prefix():
    prepared = small()
    groups = parameter_groups(prepared, {"blocks": 0.1, "blocks.1.conv1": 0.2, "head": 0.3}, 0.4, 0.01)
    count = {g["name"]: (len(g["params"]), g["lr"], g["weight_decay"]) for g in groups}
    assert count == {
        "": (3, 0.4, 0.01),
        "blocks": (11, 0.1, 0.01),
        "blocks.1.conv1": (1, 0.2, 0.01),
        "head": (2, 0.3, 0.01),
    }
    with pytest.raises(
        ConfigError, match="qat.rates names modules, but got 'block'. At the top there are: stem, blocks, h"
    ):
        parameter_groups(prepared, {"block": 0.1}, 0.4)


def test_steps_above_a_fifth_of_the_float_steps_are_cut_with_both_numbers(caplog):
    prepared = small()
    with caplog.at_level(logging.WARNING):
        report = train(prepared, list(data()), loss, sgd(prepared), settings=QatSettings(steps=50, float_steps=20))
    assert report.steps == 4 and report.finished
    assert report.findings == ("QAT takes at most 20 % of 20 float steps: 50 steps cut to 4",)
    assert report.findings[0] in caplog.text


def test_a_scheduler_is_stepped_and_gradients_are_clipped():
    prepared = small()
    optimizer = sgd(prepared, 0.1)
    norms = []
    optimizer.register_step_pre_hook(
        lambda o, a, k: norms.append(
            torch.nn.utils.get_total_norm([p.grad for p in o.param_groups[0]["params"] if p.grad is not None])
        )
    )
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    report = train(prepared, data(3), loss, optimizer, schedule, QatSettings(steps=3, clip_gradients=0.01))
    assert report.learning_rates == (0.1, 0.05, 0.025)
    assert all(norm <= 0.0101 for norm in norms)


def test_a_rate_decays_to_zero_along_half_a_cosine_unless_a_scheduler_is_given():
    settings = QatSettings(steps=4, cosine_decay=True)
    prepared = small()
    found = train(prepared, list(data()), loss, sgd(prepared, 1e-3), settings=settings).learning_rates
    assert found == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    prepared = small()
    optimizer = sgd(prepared, 1e-3)
    halved = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    own = train(prepared, list(data()), loss, optimizer, halved, settings)
    assert own.learning_rates == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_data_that_end_early_are_said_and_none_is_refused():
    prepared = small()
    report = train(prepared, data(2), loss, sgd(prepared), settings=QatSettings(steps=5))
    assert (report.finished, report.reason) == (False, "the data ended after 2 of 5 steps")
    with pytest.raises(DataError, match="QAT needs data, but got no batch"):
        train(prepared, [], loss, sgd(prepared), settings=QatSettings(steps=5))
    with pytest.raises(ConfigError, match=r"A loss is one number, but got \(8, 5\)"):
        train(prepared, data(), lambda o, b: o, sgd(prepared), settings=QatSettings(steps=5))


def test_nan_names_the_step_and_the_first_operator():
    prepared = small()

    def batches():
        yield from data(2)
        with torch.no_grad():
            prepared.model.blocks[0].conv2.weight[0, 0, 0, 0] = float("nan")
        yield from data(1)

    with pytest.raises(
        DivergedError, match=r"finite, but got nan at step 3; .*first bad operator is blocks.0.conv2 \(NaN\)"
    ) as caught:
        train(prepared, batches(), loss, sgd(prepared), settings=QatSettings(steps=9))
    assert isinstance(caught.value, TrialError) and "\n" not in str(caught.value)
    assert (caught.value.step, caught.value.first_bad_operator, caught.value.report.steps) == (3, "blocks.0.conv2", 2)
    assert prepared.watch is None and not prepared.training


def test_a_loss_that_runs_away_names_the_operator_out_of_range():
    prepared = small()
    settings = QatSettings(steps=60, first_losses=2, divergence=10)

    def batches():
        yield from data(3)
        with torch.no_grad():
            prepared.model.blocks[1].conv2.weight.mul_(1e4)
        yield from data(3)

    with pytest.raises(
        DivergedError, match="below 10 times its first values .* at step 5; .* first bad operator is blocks.1.relu"
    ) as caught:
        train(prepared, batches(), lambda o, b: o.square().mean(), sgd(prepared, 1e-4), settings=settings)
    assert caught.value.first_bad_operator == "blocks.1.relu(1)"


def test_a_gradient_that_is_not_finite_names_its_parameter():
    prepared = small()

    def bad(outputs, batch):
        return (outputs * 0).abs().sqrt().sum() + outputs.sum() * 0

    with pytest.raises(
        DivergedError, match=r"Gradients are finite, but got NaN or inf at step 1 \(loss 0\); .* of stem.0.weight"
    ):
        train(prepared, data(), bad, sgd(prepared), settings=QatSettings(steps=1))


def test_the_same_seed_gives_the_same_training():
    states = []
    for seed in (0, 0, 1):
        prepared = dropped()
        train(prepared, list(data()), loss, sgd(prepared), settings=QatSettings(steps=3, seed=seed))
        states.append(prepared.state_dict())
        torch.rand(5)
    assert same(states[0], states[1]) and not same(states[0], states[2])


def dropped():
    class Dropped(ResNet):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.2, self.training)

    torch.manual_seed(0)
    return calibrated(revive(Dropped()), torch.randn(4, 3, 16, 16))[0]


@pytest.mark.parametrize("mode", NORM_MODES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(mode, kind, tmp_path):
    def parts():
        prepared = dropped()
        groups = parameter_groups(prepared, {"head": 0.01}, 0.002, 0.01)
        optimizer = torch.optim.AdamW(groups) if kind == "adamw" else torch.optim.SGD(groups, momentum=0.9)
        return prepared, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.01] * 2, total_steps=20)

    def run(steps, path, resume=False):
        prepared, optimizer, schedule = parts()
        settings = QatSettings(steps=steps, mode=mode)
        report = train(prepared, list(data(4)), loss, optimizer, schedule, settings, checkpoint=path, resume=resume)
        return prepared.state_dict(), optimizer.state_dict(), report

    straight, optimizer, whole = run(6, tmp_path / "a.safetensors")
    run(3, tmp_path / "b.safetensors")
    torch.rand(7)
    resumed, again, report = run(6, tmp_path / "b.safetensors", resume=True)
    assert same(straight, resumed)
    assert report.losses == whole.losses and report.learning_rates == whole.learning_rates
    for key, state in optimizer["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(again["state"][key][k]))
            for k, v in state.items()
            if v is not None
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    settings = QatSettings(steps=2, checkpoint_every=1)
    prepared = small()
    train(prepared, data(), loss, sgd(prepared), settings=settings, checkpoint=path)
    other = small(QDtype.qint16)
    with pytest.raises(TrialError, match=r"its own qconfig, but got another dtype at store.0 \(quant\[x\]\)"):
        train(other, data(), loss, sgd(other), settings=settings, checkpoint=path, resume=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(TrialError, match="A checkpoint is a safetensors file, but got c.safetensors"):
        train(prepared, data(), loss, sgd(prepared), settings=settings, checkpoint=path, resume=True)


def test_amp_is_for_int8():
    prepared = small()
    assert train(prepared, data(), loss, sgd(prepared), settings=QatSettings(steps=1, amp=True)).finished
    with pytest.raises(ConfigError, match="qat.amp is for int8 alone"):
        train(small(QDtype.qint16), data(), loss, sgd(prepared), settings=QatSettings(steps=1, amp=True))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("mode", "bn", "qat.mode is one of fuse_bn, with_bn, with_bn_reverse_fold, but got 'bn'"),
        ("steps", -1, "qat.steps lies between 0 and"),
        ("learning_rate", float("nan"), "qat.learning_rate lies between 0 and 10, but got nan"),
        ("rates", {"head": -1.0}, "qat.rates.head lies between"),
        ("divergence", 0.5, "qat.divergence lies between 1 and 1e.12, but got 0.5"),
        ("clip_gradients", 0.0, "qat.clip_gradients lies between"),
        ("float_steps", 0, "qat.float_steps lies between"),
    ],
)
def test_settings_are_checked(field, value, text):
    with pytest.raises(ConfigError, match=text):
        QatSettings(**{field: value})


def test_the_schema_has_the_fields_and_defaults_of_the_settings():
    settings = QatSettings()
    for schema, record in ((QatSchema(), settings), (TeacherSchema(), settings.teacher)):
        assert [f.name for f in dataclasses.fields(schema)] == [f.name for f in dataclasses.fields(record)]
        for f in dataclasses.fields(schema):
            a, b = getattr(schema, f.name), getattr(record, f.name)
            assert isinstance(a, TeacherSchema) or (tuple(a) if isinstance(a, list) else a) == b


def test_the_share_of_the_float_steps_is_checked_or_said_not_to_be():
    assert "qat.float_steps=<n>" in QatSettings(steps=10).unchecked
    assert QatSettings(steps=10, float_steps=100).unchecked == QatSettings().unchecked == ""
