"""What is trained is never trained twice, and another loss or other data is never taken for the same training."""

import functools
import os
import signal
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import TensorDataset

from qflow.core.errors import DataError
from qflow.core.qat_settings import SINCE
from qflow.core.settings import CalibrationSettings, QatSettings, QConfigSettings, TrialSettings
from qflow.cost_model.model import CostModel
from qflow.quant.train.interrupt import interrupts_held
from qflow.quant.train.qat import NONE_LEARNED
from qflow.tasks import digits
from qflow.trial.evaluator import Evaluator
from qflow.trial.training import NO_TRAIN_SPLIT, Training

pytestmark = pytest.mark.slow  # trains

SGD = functools.partial(torch.optim.SGD, momentum=0.9)


class Spied:
    """The loss without the calls in its identity."""

    def __init__(self, calls, factor=1.0, on_call=None):
        self.calls, self.factor, self.on_call = calls, factor, on_call

    def __getstate__(self):
        return {"factor": self.factor}

    def __call__(self, outputs, batch):
        if not torch.is_grad_enabled():  # no step: the first batch is judged again
            return digits.loss(outputs, batch) * self.factor
        self.calls.append(1)
        if self.on_call:
            self.on_call(len(self.calls))
        return digits.loss(outputs, batch) * self.factor


@pytest.fixture
def made(digits_task, nash_m, tmp_path):
    def evaluator(loss, scheduler=None, data=None):
        task = replace(digits_task, data=data) if data else digits_task
        found = Evaluator(task, nash_m, CostModel(), eval_batch=256, training=Training(loss, SGD, scheduler),
                      checkpoints=tmp_path / "training")  # fmt: skip
        found.measure_float()
        return found

    return evaluator


def trained(evaluator, steps=4, calibration=None, **qat):
    settings = QatSettings(steps=steps, batch_size=16, learning_rate=0.01, **qat)
    calibration = calibration or CalibrationSettings(batch_size=16, steps=4)
    return evaluator.run_trial(TrialSettings(calibration=calibration, qat=settings))


def test_another_loss_is_another_training(made):
    calls = []
    trained(made(Spied(calls)))
    other = trained(made(Spied(calls, factor=3.0)))
    assert len(calls) == 8
    assert other.training.losses == trained(made(Spied([], factor=3.0))).training.losses


def test_other_training_data_are_another_training(made, digits_task):
    calls = []
    trained(made(Spied(calls)))
    images, labels = digits_task.data.train.tensors
    labels = labels.clone()
    labels[1] += 1
    trained(made(Spied(calls), data=replace(digits_task.data, train=TensorDataset(images, labels))))
    assert len(calls) == 8


def test_a_rate_probe_goes_on_where_there_is_no_scheduler(made):
    """The probe leaves the scheduler out, the candidate does not: without one that is the same training."""
    calls = []
    evaluator = made(Spied(calls))
    trained(evaluator, steps=2, scheduled=False)
    longer = trained(evaluator, steps=4, scheduled=True, checkpoint_every=3)
    assert len(calls) == 4
    assert longer.evaluated
    assert not trained(evaluator, steps=4, scheduled=False).evaluated  # known: not even evaluated again


def test_with_a_scheduler_the_probe_is_another_training(made):
    calls = []
    evaluator = made(Spied(calls), functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1))
    trained(evaluator, steps=2, scheduled=False)
    trained(evaluator, steps=4, scheduled=True)
    assert len(calls) == 6


def test_a_longer_training_whose_rate_decays_is_another_training(made):
    calls = []
    evaluator = made(Spied(calls))
    trained(evaluator, steps=2, cosine_decay=True)
    longer = trained(evaluator, steps=4, cosine_decay=True)
    assert len(calls) == 6
    assert longer.training.learning_rates[0] == 0.01 > longer.training.learning_rates[-1]


def test_what_moving_scales_read_of_the_calibration_tells_trainings_apart(made):
    evaluator = made(Spied([]))
    for margin in (1.25, 2.0):
        trained(evaluator, calibration=CalibrationSettings(batch_size=16, steps=4, int16_margin=margin))
    assert evaluator.hits == 0


def test_the_float_model_teaches_on_the_calibration_data_where_there_is_no_train_split(made, digits_task):
    without = replace(digits_task.data, train=None)
    evaluator = made(None, data=without)
    found = trained(evaluator, steps=6, teacher={"weight": 1.0}, moving=False, ema=0.5)
    assert found.training.losses[-1] < found.training.losses[0]
    assert NO_TRAIN_SPLIT in found.training.findings
    assert any(NO_TRAIN_SPLIT in finding.message for finding in found.check.findings)
    longer = trained(made(None, data=without), steps=8, teacher={"weight": 1.0}, moving=False, ema=0.5)
    assert longer.training.losses[:6] == found.training.losses  # from the checkpoint
    assert NO_TRAIN_SPLIT not in trained(made(None), teacher={"weight": 1.0}).training.findings
    with pytest.raises(DataError, match=r"QAT needs task.data.train with at least one batch"):
        trained(made(Spied([]), data=without), teacher={"weight": 1.0})


def test_learned_scales_of_a_checkpoint_go_on_and_int16_has_none_to_learn(made):
    whole = trained(made(Spied([])), steps=6, learned_scales=10.0)
    evaluator = made(Spied([]))
    for file in evaluator.checkpoints.rglob("*.safetensors"):
        file.unlink()
    trained(evaluator, steps=3, learned_scales=10.0)
    again = trained(evaluator, steps=6, learned_scales=10.0)
    assert again.scales == whole.scales
    assert again.training.losses == whole.training.losses
    fixed = trained(evaluator, steps=6, moving=False)
    assert any(again.scales[name] != scale for name, scale in fixed.scales.items() if not name.endswith(".weight"))
    settings = QatSettings(steps=1, batch_size=16, learned_scales=10.0)
    wide = evaluator.run_trial(TrialSettings(qconfig=QConfigSettings(template="qint16"), qat=settings))
    assert NONE_LEARNED in wide.training.findings


def test_a_training_of_an_earlier_version_has_the_same_key():
    before = QatSettings(steps=3).decisive()
    assert not set(SINCE) & set(before)
    assert len(before) == len(fields(QatSettings)) - len(SINCE)
    assert QatSettings(ema=0.9).decisive() == {**QatSettings().decisive(), "ema": 0.9}
    taught = QatSettings(teacher={"weight": 1.0}).decisive()["teacher"]
    assert taught == {"weight": 1.0, "features": [], "temperature": 0.0}


def test_a_training_has_one_checkpoint_however_often_it_went_on(made, tmp_path):
    calls = []
    for steps in (1, 2, 4):
        trained(made(Spied(calls)), steps=steps)
    assert len(calls) == 4
    (file,) = (tmp_path / "training").rglob("*.safetensors")
    assert file.stem.endswith("-4")


def test_a_damaged_checkpoint_is_begun_again_and_said(made, tmp_path, caplog):
    calls = []
    first = trained(made(Spied(calls)), steps=2)
    (file,) = (tmp_path / "training").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert trained(made(Spied(calls)), steps=4).training.losses[:2] == first.training.losses
    assert len(calls) == 6
    assert "is damaged and starts over" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_where_it_stopped(made, number):
    """Within a step: the step is ended, saved, and then the interrupt is given on."""
    whole, calls = trained(made(Spied([])), steps=6), []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = made(Spied([])).checkpoints
    for file in folder.rglob("*.safetensors"):
        file.unlink()

    def interrupt(call):
        if call == 3:
            os.kill(os.getpid(), number)

    try:
        with pytest.raises(KeyboardInterrupt):
            trained(made(Spied(calls, on_call=interrupt)), steps=6)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == 3
    again = trained(made(Spied(calls)), steps=6)
    assert len(calls) == 6
    assert again.training.losses == whole.training.losses
    assert all(torch.equal(tensor, whole.weights[name]) for name, tensor in again.weights.items())


def test_a_second_interrupt_does_not_wait():
    with pytest.raises(KeyboardInterrupt), interrupts_held() as held:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGINT)
        assert held.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it waited")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_nothing_identifies_leaves_no_checkpoint_and_says_so(made):
    said = []
    evaluator = made(SimpleNamespace(stream=open(os.devnull)))  # noqa: SIM115
    evaluator.cache.say = said.append
    assert evaluator.training_folder("train") is None
    line = "training     keeps no checkpoints: qat.loss.stream (TextIOWrapper) cannot be recognised at the next start"
    assert said == [line]
    evaluator.training.loss.stream.close()
