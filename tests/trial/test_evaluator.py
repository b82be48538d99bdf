"""A trial pays for what is new in it, and a hit is a miss's twin."""

from dataclasses import fields
from types import SimpleNamespace

import pytest

from qflow.core.errors import ConfigError
from qflow.core.settings import CalibrationSettings, QConfigSettings, TrialSettings
from qflow.trial.cache import Cache


def trial(evaluator, ratio=0.0, **calibration):
    settings = CalibrationSettings(**{"batch_size": 16, "steps": 4, **calibration})
    return evaluator.run_trial(TrialSettings(qconfig=QConfigSettings(int16_ratio=ratio), calibration=settings))


def test_equal_qconfigs_are_evaluated_once(evaluator):
    first = trial(evaluator)
    again = trial(evaluator)
    assert first.evaluated
    assert not again.evaluated
    assert evaluator.hits == 1
    assert (again.metric, again.scales) == (first.metric, first.scales)


def test_the_score_of_each_sample_is_kept_and_its_mean_is_the_metric(evaluator):
    first, again = trial(evaluator), trial(evaluator)
    assert len(first.scores) == first.samples == len(evaluator.float_scores)
    assert set(first.scores) <= {0.0, 1.0} and sum(first.scores) / len(first.scores) == pytest.approx(first.metric)
    assert again.scores == first.scores  # a hit
    assert sum(evaluator.float_scores) / len(evaluator.float_scores) == pytest.approx(evaluator.float_metric)


def test_the_same_settings_give_the_same_numbers(digits_task, nash_m, evaluator):
    from qflow.cost_model.model import CostModel
    from qflow.trial.evaluator import Evaluator

    other = Evaluator(digits_task, nash_m, CostModel(), eval_batch=256)
    other.measure_float()
    a, b = trial(evaluator, 1.0), trial(other, 1.0)
    assert a.scales_digest == b.scales_digest
    assert (a.metric, a.cost.latency_ms) == (b.metric, b.cost.latency_ms)


def test_order_of_trials_does_not_matter(evaluator):
    before = trial(evaluator, method="kl")
    trial(evaluator, 1.0, method="mse")
    evaluator.cache = Cache()
    after = trial(evaluator, method="kl")
    assert before.scales == after.scales
    assert before.metric == after.metric


def test_another_method_needs_no_data_again(evaluator):
    trial(evaluator, method="mse")
    trial(evaluator, method="kl")
    assert (evaluator.cache.misses["calibration"], evaluator.cache.hits["calibration"]) == (1, 1)


def test_ratio_one_is_the_int16_template(evaluator):
    from qflow.core.dtype import QDtype

    assert trial(evaluator, 1.0).qconfig.digest == evaluator.template(QDtype.qint16)[1].digest


def test_what_gains_most_for_its_time_may_go_first(evaluator):
    from qflow.core.dtype import QDtype

    evaluator.rank()
    settings = QConfigSettings(int16_ratio=0.5, ranking="score_per_ms")
    chosen = set(evaluator.resolve(settings)[0].names(QDtype.qint16))
    costs = evaluator.pricer.promotions(evaluator.template(QDtype.qint8)[1])
    worth = {name: evaluator.scores.get(name, 0.0) / max(costs[name], 1e-5) for name in evaluator.precisions.promotable}
    assert chosen == set(sorted(worth, key=lambda name: -worth[name])[: len(chosen)])
    assert 0 < len(chosen) < len(worth)
    with pytest.raises(ConfigError, match="score_per_ms counts operators by activation, but got weight"):
        QConfigSettings(ranking="score_per_ms", sensitive_type="weight")


def test_a_ratio_without_sensitivities_is_refused(evaluator):
    with pytest.raises(ConfigError, match="needs sensitivities"):
        trial(evaluator, 0.5)


def test_a_small_calibration_set_is_used_whole(evaluator):
    """The guide: if the training set is small, use it all for calibration."""
    whole = trial(evaluator, batch_size=64, steps=100)
    assert whole.calibration_samples == 512
    exact = trial(evaluator, batch_size=64, steps=8)
    assert (exact.scales, exact.evaluated) == (whole.scales, False)
    uneven = evaluator.calibrate(CalibrationSettings(batch_size=100, steps=100))
    assert (uneven.samples, uneven.steps) == (512, 6)


def test_a_float_metric_other_than_stated_is_refused(evaluator):
    from dataclasses import replace

    evaluator.task = replace(evaluator.task, stated_metric=0.5)
    with pytest.raises(ConfigError, match=r"its task states \(0.5 within 0.002\), but got 0.99"):
        evaluator.measure_float()


def test_scales_do_not_remember_an_earlier_trial(evaluator):
    """An operator in fp16 has no scale, also where it was int8 before: a rebuilt trial must look the same."""
    from qflow.core.dtype import QDtype
    from qflow.core.qconfig import OpQConfig
    from qflow.quant.model.calibrate import apply_scales
    from qflow.quant.model.quantized_model import scales

    settings = CalibrationSettings(batch_size=16, steps=4)
    qconfig = evaluator.template(QDtype.qint8)[1].with_ops({"[add]": OpQConfig(QDtype.float16)})
    stats = evaluator.calibrate(settings)
    apply_scales(evaluator.prepared, stats, qconfig, settings)
    fresh = scales(evaluator.prepared)
    trial(evaluator, 1.0)
    apply_scales(evaluator.prepared, stats, qconfig, settings)
    assert scales(evaluator.prepared) == fresh
    assert fresh["[add]"] == 0.0


def test_an_operator_that_only_some_samples_reach_is_refused(digits_task, nash_m):
    """A branch on the data that the traced sample did not take: the operator in it would pass unquantized."""
    import torch
    from torch import nn

    from qflow.core.errors import ModelError
    from qflow.cost_model.model import CostModel
    from qflow.tasks.task import make_task
    from qflow.trial.evaluator import Evaluator

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = digits_task.model, 0

        def forward(self, image):
            return self.inner(torch.tanh(image) if image[0, 0, 4, 4] > 0.9 else image)

    task = make_task(name="branch", model=Branch().eval(), data=digits_task.data, metric=digits_task.metric)
    evaluator = Evaluator(task, nash_m, CostModel(), eval_batch=8)
    evaluator.measure_float()
    with pytest.raises(ModelError, match=r"unplanned operators \['\[tanh\] at test_evaluator.py:\d+'\]"):
        trial(evaluator)


def test_what_the_device_bars_from_int16_says_so_in_every_trial(nash_m):
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from qflow.cost_model.model import CostModel
    from qflow.tasks.task import make_task
    from qflow.trial.evaluator import Evaluator

    class Data:
        calibration = evaluation = TensorDataset(torch.randn(64, 3, 8, 8), torch.zeros(64))

    class Score:
        direction = "maximize"

        def __call__(self, outputs, batch):
            return outputs.mean(dim=(1, 2, 3))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Sigmoid()).eval()
    evaluator = Evaluator(
        make_task(name="t", model=model, data=Data, metric=Score()), nash_m, CostModel(), eval_batch=32
    )
    evaluator.measure_float()
    rows = {r.op: r for r in trial(evaluator, 1.0).check.rows}
    assert rows["1"].applied == "qint8"
    assert rows["1"].reason == "no int16: 2 (max_pool) takes int8 input only"


FIELDS = {
    "method": "kl", "batch_size": 8, "steps": 1, "percentile": 90.0, "averaging_constant": 0.01, "int16_margin": 4.0,
    "divisor": "plugin", "clip_min": -0.1, "clip_max": 0.1, "std_scale": 0.5, "sampling": 1, "float16_clip": True,
    "augment": True,
}  # fmt: skip


METHODS = {
    "percentile": "percentile", "averaging_constant": "minmax", "clip_min": "clip", "clip_max": "clip",
    "std_scale": "clip_std",
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in fields(CalibrationSettings)])
def test_whatever_a_calibration_setting_changes_a_shared_evaluator_sees(field, nash_m):
    """fp16 that overflows, an input in int16 of an int8 result, and both integer dtypes: all that a scale can be."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from qflow.core.dtype import QDtype
    from qflow.core.qconfig import OpQConfig
    from qflow.cost_model.model import CostModel
    from qflow.tasks.task import make_task
    from qflow.trial.evaluator import Evaluator

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.third(torch.clamp(self.second(self.first(x)) * 3e5, -1e5, 1e5))

    class Score:
        direction = "maximize"

        def __call__(self, outputs, batch):
            return outputs.nan_to_num(0.0, 1e6, -1e6).mean(1)

    torch.manual_seed(0)
    samples = TensorDataset(torch.randn(64, 8), torch.zeros(64))
    augmented = TensorDataset(samples.tensors[0] * 3.0, samples.tensors[1])
    data = SimpleNamespace(calibration=samples, evaluation=samples, calibration_augmented=augmented)
    task = make_task(name="t", model=Net().eval(), data=data, metric=Score())

    def made():
        found = Evaluator(task, nash_m, CostModel(), eval_batch=32)
        found.measure_float()
        return found

    def metric_of(evaluator, calibration):
        qconfig = evaluator.template(QDtype.qint8)[1].with_ops(
            {
                "[mul]": OpQConfig(QDtype.float16),
                "[clamp]": OpQConfig(QDtype.qint16),
                "second": OpQConfig(QDtype.qint8, weight=QDtype.qint8, input=(QDtype.qint16,)),
            }
        )
        return evaluator.run_qconfig(qconfig, qconfig, TrialSettings(calibration=calibration)).metric

    # Long: the model, task and qconfig of this test are built in it.
    base = {"method": METHODS.get(field, "mse"), "batch_size": 16, "steps": 4}
    settings = CalibrationSettings(**base)
    changed = CalibrationSettings(**{**base, field: FIELDS[field]})
    shared = made()
    before = metric_of(shared, settings)
    assert metric_of(shared, changed) == metric_of(made(), changed)
    assert before == metric_of(made(), settings)
    if field in ("float16_clip", "method", "int16_margin", "divisor", "std_scale", "augment"):
        assert metric_of(shared, changed) != before  # the test sees what it is about


def test_a_known_trial_says_what_calibrated_it(evaluator):
    """Two amounts that lead to the same scales share the evaluation, not the record."""
    first = trial(evaluator, method="clip", clip_min=-1e-3, clip_max=1e-3)
    again = trial(evaluator, method="clip", clip_min=-1e-3, clip_max=1e-3, steps=8)
    assert again.scales == first.scales
    assert (again.evaluated, again.calibration_samples) == (False, 128)


def test_calibration_reads_the_augmented_split_where_it_is_asked_to(digits_task, nash_m):
    """What a data set draws is the same at each reading, so a trial can be rebuilt."""
    from dataclasses import replace

    import torch

    from qflow.cost_model.model import CostModel
    from qflow.trial.evaluator import Evaluator

    class Shifted(torch.utils.data.Dataset):
        def __len__(self):
            return len(digits_task.data.calibration)

        def __getitem__(self, index):
            image, label = digits_task.data.calibration[index]
            return image.roll(int(torch.randint(-1, 2, ())), -1) * 2.0, label

    data = SimpleNamespace(**vars(digits_task.data), calibration_augmented=Shifted())
    found = []
    for _ in range(2):
        made = Evaluator(replace(digits_task, data=data), nash_m, CostModel(), eval_batch=256)
        made.measure_float()
        found.append([trial(made, augment=augment).scales for augment in (True, False)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    plain = Evaluator(digits_task, nash_m, CostModel(), eval_batch=256)
    plain.measure_float()
    with pytest.raises(ConfigError, match=r"calibration.augment=true reads task.data.calibration_augmented, but"):
        trial(plain, augment=True)
