"""A trial pays for what is new in it, and a hit is a miss's twin."""

import pytest

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
    from qflow.cost.latency import CostModel

    other = Bench(digits_task, nash_m, CostModel(), eval_batch=256)
    other.measure_float()
    a, b = trial(bench, 1.0), trial(other, 1.0)
    assert a.scales_digest == b.scales_digest
    assert (a.metric, a.cost.latency_ms) == (b.metric, b.cost.latency_ms)


def test_order_of_trials_does_not_matter(bench):
    before = trial(bench, method="kl")
    trial(bench, 1.0, method="mse")
    bench._done.clear()
    after = trial(bench, method="kl")
    assert before.scales == after.scales
    assert before.metric == after.metric


def test_another_method_needs_no_data_again(bench):
    trial(bench, method="mse")
    passes = dict(bench._stats)
    trial(bench, method="kl")
    assert bench._stats == passes


def test_ratio_one_is_the_int16_template(bench):
    from qflow.core.dtype import QDtype

    assert trial(bench, 1.0).qconfig.digest == bench.template(QDtype.qint16)[1].digest


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
    from qflow.core.settings import QConfigSettings

    names = [n.name for n in bench.graph.quantized if n.kind == "add"]
    settings = TrialSettings(
        qconfig=QConfigSettings(modules={names[0]: "float16"}), calibration=CalibrationSettings(batch_size=16, steps=4)
    )
    # the convolution that reads it needs a price for fp16 input, which the device file does not have
    bench.cost_model = type(bench.cost_model)(mac_factors={**bench.cost_model.mac_factors, "float16/qint8": 2.0})
    fresh = bench.run_trial(settings).scales
    trial(bench, 1.0)
    bench._done.clear()
    assert bench.run_trial(settings).scales == fresh
    assert fresh[names[0]] == 0.0
