"""A trial pays for what is new in it, and a hit is a miss's twin."""

import pytest

from qflow.cache import Cache
from qflow.core.errors import ConfigError, DataError
from qflow.core.settings import CalibrationSettings, QConfigSettings, TrialSettings


def trial(bench, ratio=0.0, **calibration):
    settings = CalibrationSettings(**{"batch_size": 16, "steps": 4, **calibration})
    return bench.run_trial(TrialSettings(qconfig=QConfigSettings(int16_ratio=ratio), calibration=settings))


def test_equal_qconfigs_are_evaluated_once(bench):
    first = trial(bench)
    again = trial(bench)
    assert not first.shared
    assert again.shared
    assert bench.hits == 1
    assert (again.metric, again.scales) == (first.metric, first.scales)


def test_the_same_settings_give_the_same_numbers(digits_task, nash_m, bench):
    from qflow.bench import Bench
    from qflow.cost.model import CostModel

    other = Bench(digits_task, nash_m, CostModel(), eval_batch=256)
    other.measure_float()
    a, b = trial(bench, 1.0), trial(other, 1.0)
    assert a.scales_digest == b.scales_digest
    assert (a.metric, a.cost.latency_ms) == (b.metric, b.cost.latency_ms)


def test_order_of_trials_does_not_matter(bench):
    before = trial(bench, method="kl")
    trial(bench, 1.0, method="mse")
    bench._done.clear()
    bench.cache = Cache()
    after = trial(bench, method="kl")
    assert before.scales == after.scales
    assert before.metric == after.metric


def test_another_method_needs_no_data_again(bench):
    trial(bench, method="mse")
    trial(bench, method="kl")
    assert (bench.cache.misses["calibration"], bench.cache.hits["calibration"]) == (1, 1)


def test_ratio_one_is_the_int16_template(bench):
    from qflow.core.dtype import QDtype

    assert trial(bench, 1.0).qconfig.digest == bench.template(QDtype.qint16)[1].digest


def test_what_gains_most_for_its_time_may_go_first(bench):
    from qflow.core.dtype import QDtype

    bench.rank()
    settings = QConfigSettings(int16_ratio=0.5, ranking="score_per_ms")
    chosen = set(bench.resolve(settings)[0].names(QDtype.qint16))
    costs = bench.pricer.promotions(bench.template(QDtype.qint8)[1])
    worth = {name: bench.scores.get(name, 0.0) / max(costs[name], 1e-5) for name in bench.precisions.promotable}
    assert chosen == set(sorted(worth, key=lambda name: -worth[name])[: len(chosen)])
    assert 0 < len(chosen) < len(worth)
    with pytest.raises(ConfigError, match="score_per_ms counts operators by activation, but got weight"):
        QConfigSettings(ranking="score_per_ms", sensitive_type="weight")


def test_a_ratio_without_sensitivities_is_refused(bench):
    with pytest.raises(ConfigError, match="needs sensitivities"):
        trial(bench, 0.5)


def test_too_few_calibration_samples_are_refused(bench):
    with pytest.raises(DataError, match="batch_size x steps = 6400 samples, but got 512"):
        trial(bench, batch_size=64, steps=100)


def test_a_float_metric_other_than_stated_is_refused(bench):
    from dataclasses import replace

    bench.task = replace(bench.task, stated_metric=0.5)
    with pytest.raises(ConfigError, match=r"its task states \(0.5 within 0.002\), but got 0.99"):
        bench.measure_float()


def test_scales_do_not_remember_an_earlier_trial(bench):
    """An operator in fp16 has no scale, also where it was int8 before: a rebuilt trial must look the same."""
    from qflow.core.dtype import QDtype
    from qflow.core.qconfig import OpQConfig
    from qflow.quant.calibrate import apply_scales
    from qflow.quant.quantized_model import scales

    settings = CalibrationSettings(batch_size=16, steps=4)
    qconfig = bench.template(QDtype.qint8)[1].with_ops({"[add]": OpQConfig(QDtype.float16)})
    stats = bench.calibrate(settings)
    apply_scales(bench.prepared, stats, qconfig, settings)
    fresh = scales(bench.prepared)
    trial(bench, 1.0)
    apply_scales(bench.prepared, stats, qconfig, settings)
    assert scales(bench.prepared) == fresh
    assert fresh["[add]"] == 0.0


def test_an_operator_that_only_some_samples_reach_is_refused(digits_task, nash_m):
    """A branch on the data that the traced sample did not take: the operator in it would pass unquantized."""
    import torch
    from torch import nn

    from qflow.bench import Bench
    from qflow.core.errors import ModelError
    from qflow.cost.model import CostModel
    from qflow.tasks.task import make_task

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = digits_task.model, 0

        def forward(self, image):
            return self.inner(torch.tanh(image) if image[0, 0, 4, 4] > 0.9 else image)

    task = make_task(name="branch", model=Branch().eval(), data=digits_task.data, metric=digits_task.metric)
    bench = Bench(task, nash_m, CostModel(), eval_batch=8)
    bench.measure_float()
    with pytest.raises(ModelError, match=r"unplanned operators \['\[tanh\] at test_bench.py:\d+'\]"):
        trial(bench)


def test_what_the_device_bars_from_int16_says_so_in_every_trial(nash_m):
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from qflow.bench import Bench
    from qflow.cost.model import CostModel
    from qflow.tasks.task import make_task

    class Data:
        calibration = evaluation = TensorDataset(torch.randn(64, 3, 8, 8), torch.zeros(64))

    class Score:
        direction = "maximize"

        def __call__(self, outputs, batch):
            return outputs.mean(dim=(1, 2, 3))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.Sigmoid()).eval()
    bench = Bench(make_task(name="t", model=model, data=Data, metric=Score()), nash_m, CostModel(), eval_batch=32)
    bench.measure_float()
    rows = {r.op: r for r in trial(bench, 1.0).check.rows}
    assert rows["1"].applied == "qint8"
    assert rows["1"].reason == "no int16: 2 (max_pool) takes int8 input only"


def test_data_that_change_anywhere_change_the_fingerprint_sooner_or_later(bench):
    """32 samples of each split are hashed; the float metric over all evaluation data stands beside them."""
    from qflow.tasks.identity import data_digest

    before = data_digest(bench.task)
    images = bench.task.data.evaluation.tensors[0]
    step = len(images) // 32
    kept = images[5 * step].clone()
    images[5 * step] += 0.5
    try:
        assert data_digest(bench.task) != before
    finally:
        images[5 * step] = kept
    assert data_digest(bench.task) == before
