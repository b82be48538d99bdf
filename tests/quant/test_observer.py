"""Every method against a direct computation on the raw values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.settings import METHODS, CalibrationSettings
from qflow.quant.observer import BINS, Histogram


def histogram(*batches):
    made = Histogram()
    for batch in batches:
        made.update(batch, "x")
    return made


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return [torch.randn(20_000) * (1 + 0.3 * i) for i in range(6)]  # the range grows: bins must merge


def test_nothing_is_lost_when_the_range_doubles(data):
    made = histogram(*data)
    assert made.counts.sum() + made.zeros == sum(len(d) for d in data)
    assert made.largest == float(torch.cat(data).abs().max())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=5))
def test_counts_are_those_of_the_final_bins(limits):
    torch.manual_seed(1)
    batches = [torch.rand(500) * limit for limit in limits]
    made = histogram(*batches)
    index = (torch.cat(batches).abs().double() * BINS / made.limit).long().clamp(max=BINS - 1)
    direct = torch.bincount(index, minlength=BINS).double()
    assert (made.counts.cumsum(0) - direct.cumsum(0)).abs().max() <= 2  # float32 against float64 at bin edges


def test_minmax_is_the_largest_value_or_its_moving_average(data):
    made = histogram(*data)
    assert made.threshold(QDtype.qint8, CalibrationSettings(method="minmax")) == made.largest
    value = float(data[0].abs().max())
    for batch in data[1:]:
        value += 0.01 * (float(batch.abs().max()) - value)
    averaged = made.threshold(QDtype.qint8, CalibrationSettings(method="minmax", averaging_constant=0.01))
    assert averaged == pytest.approx(value)


def test_percentile_is_exact_to_a_bin(data):
    values = torch.cat(data).abs().double()
    made = histogram(*data)
    for percent in (99.0, 99.9, 99.99):
        exact = float(values.quantile(percent / 100))
        assert made.percentile(percent) == pytest.approx(exact, abs=1.5 * made.limit / BINS)


def direct_error(x, threshold, dtype):
    step = threshold / -dtype.qmin
    return float(((x / step).round().clamp(dtype.qmin, dtype.qmax) * step - x).square().sum())


def test_mse_is_within_a_percent_of_the_best_threshold(data):
    values = torch.cat(data).double()
    chosen = histogram(*data).threshold(QDtype.qint8, CalibrationSettings(method="mse"))
    best = min(direct_error(values, t, QDtype.qint8) for t in torch.linspace(0.05, 1, 96).double() * values.abs().max())
    assert direct_error(values, chosen, QDtype.qint8) <= 1.01 * best


def test_kl_and_percentile_cut_outliers_that_minmax_keeps():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(100_000), torch.tensor([100.0])])
    made = histogram(x)
    for method in ("kl", "percentile"):
        assert made.threshold(QDtype.qint8, CalibrationSettings(method=method)) < 50, method


def test_kl_is_not_fooled_by_the_spike_of_a_relu():
    torch.manual_seed(0)
    x = torch.relu(torch.randn(200_000))
    kl = histogram(x).threshold(QDtype.qint8, CalibrationSettings(method="kl"))
    assert kl > 2.5  # with the spike in, it would clip the bulk


@pytest.mark.parametrize("method", METHODS)
def test_int16_takes_the_largest_value_with_a_margin_whatever_the_method(method, data):
    made = histogram(*data)
    settings = CalibrationSettings(method=method)
    assert made.threshold(QDtype.qint16, settings) == pytest.approx(1.25 * made.largest)
    assert made.scale(QDtype.qint16, settings) == pytest.approx(1.25 * made.largest / 32768)


def test_the_scale_is_the_guides_arithmetic():
    made = histogram(torch.tensor([0.9984]))
    assert made.scale(QDtype.qint8, CalibrationSettings(method="minmax")) == pytest.approx(0.0078)  # 0.0078 x 128
    plugin = CalibrationSettings(method="minmax", divisor="plugin")
    assert made.scale(QDtype.qint8, plugin) == pytest.approx(0.9984 / 127.5)


def test_a_tensor_that_is_always_zero_has_no_range():
    assert histogram(torch.zeros(9)).threshold(QDtype.qint8, CalibrationSettings()) == 0.0


def test_values_that_are_not_finite_and_bad_settings_are_refused():
    with pytest.raises(DataError, match="finite values, but got inf at x"):
        histogram(torch.tensor([1.0, float("inf")]))
    with pytest.raises(DataError, match="but got nan at x"):
        histogram(torch.tensor([1.0, float("nan")]))
    for wrong in ({"method": "max"}, {"percentile": 10.0}, {"batch_size": 0}, {"divisor": "127"}, {"steps": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CalibrationSettings(**wrong)
