"""Every method against a direct computation on the raw values."""
# Long: all methods are compared with direct computations on one table of distributions.

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.settings import METHODS, CalibrationSettings
from qflow.quant.values.bins import MOST_OCTAVES, PER_OCTAVE
from qflow.quant.values.divergence import KL_LEVELS, KL_WINDOW, divergences, least_divergence
from qflow.quant.values.observer import MIX_PERCENTILES, Histogram
from qflow.quant.values.sample import WHOLE

CUTTING = ("minmax", "percentile", "mse", "kl", "mix", "clip", "clip_std")
DTYPES = (QDtype.qint8, QDtype.qint16)


def histogram(*batches, sampling=1, by_batch=False):
    made = Histogram(sampling, by_batch=by_batch)
    for batch in batches:
        made.update(batch, "x")
    return made


def threshold(made, method, dtype=QDtype.qint8, **more):
    return made.threshold(dtype, CalibrationSettings(method=method, **more))


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    return [torch.randn(20_000) * (1 + 0.3 * i) + 0.2 for i in range(6)]  # the range grows: bins must merge


SHAPES = {
    "normal": lambda x: x,
    "relu": torch.relu,
    "one-sided": lambda x: -x.abs() - 0.5,
    "long tail": lambda x: x**3,
    "relu6": lambda x: (2 * x + 2).clamp(0, 6),
}


# ---- the statistics ------------------------------------------------------------------------------------------------


def total(made):
    return float(made.bins.counts.sum())


def same_bins(one, other):
    return one.bins.octaves == other.bins.octaves and torch.equal(one.bins.counts, other.bins.counts)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=20))
def test_every_value_lies_in_its_own_bin(values):
    x = torch.tensor(values, dtype=torch.float32)
    lower, upper, counts = histogram(x).filled()
    assert int(counts.sum()) == len(values)
    for value in x.double().tolist():
        index = int((lower <= value).sum()) - 1
        assert lower[index] <= value <= upper[index]
        assert upper[index] - lower[index] <= value / PER_OCTAVE


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=6))
def test_batches_in_any_order_give_the_bins_of_all_values_together(sizes):
    torch.manual_seed(1)
    batches = [torch.randn(500) * size for size in sizes]
    whole = histogram(torch.cat(batches))
    assert same_bins(histogram(*batches), whole)
    assert same_bins(histogram(*batches[::-1]), whole)


def test_bins_stay_few_whatever_the_range_and_keep_the_largest_values():
    powers = torch.arange(-120.0, 121.0, 2.0).exp2()  # 121 octaves
    made = histogram(powers, powers[:60])
    assert len(made.bins.octaves) == MOST_OCTAVES
    assert total(made) == 121 + 60
    lower, _, counts = made.filled()
    assert lower.tolist() == powers[-MOST_OCTAVES:].tolist()
    assert counts.tolist() == [121 + 60 - (MOST_OCTAVES - 1), *[1.0] * (MOST_OCTAVES - 1)]


def test_zeros_are_counted_apart_and_exactly():
    made = histogram(torch.tensor([0.0, -0.0, 1e-20, 0.5, -1.0]), torch.zeros(3))
    assert (made.zeros, total(made)) == (5.0, 3.0)
    assert histogram(torch.zeros(9)).threshold(QDtype.qint8, CalibrationSettings()) == 0.0
    assert not histogram(torch.empty(0)).seen


def test_moments_are_those_of_all_values(data):
    values, made = torch.cat(data).double(), histogram(*data)
    assert made.mean == pytest.approx(float(values.mean()), rel=1e-5)
    assert made.std == pytest.approx(float(values.std()), rel=1e-5)


def test_infinities_are_left_out_and_counted():
    clean = torch.tensor([0.5, -2.0, 0.0])
    masked = torch.tensor([0.5, -math.inf, -2.0, math.inf, 0.0, -math.inf])
    made, expected = histogram(masked), histogram(clean)
    assert made.infinite == 3
    assert (made.size, made.largest, made.zeros) == (3.0, 2.0, 1.0)
    for method in METHODS:
        assert threshold(made, method) == threshold(expected, method), method
    only = histogram(torch.full((4,), -math.inf))
    assert (only.infinite, only.seen, only.largest) == (4, False, 0.0)


@pytest.mark.parametrize("x", [[1.0, math.nan], [math.inf, math.nan], [math.nan]])
def test_nan_is_refused(x):
    with pytest.raises(DataError, match="takes numbers and infinities, but got nan at x"):
        histogram(torch.tensor(x))


def test_the_largest_finite_numbers_overflow_nothing():
    largest = torch.finfo(torch.float32).max
    made = histogram(torch.cat([torch.randn(1000), torch.full((1000,), -largest)]))
    assert all(0 < threshold(made, method) <= largest for method in METHODS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_dtypes_count_alike(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert same_bins(histogram(x), histogram(x.float()))


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_a_sample_stands_for_all_values_and_ends_stay_exact():
    torch.manual_seed(0)
    batches = [torch.randn(8, 16, 64, 64) for _ in range(4)]
    batches[2][3, 5, 7, 9] = 20.0
    every, some = histogram(*batches), histogram(*batches, sampling=7)
    assert some.size == pytest.approx(every.size, rel=1e-9)
    assert (some.largest, some.batch_max, some.batch_min) == (20.0, every.batch_max, every.batch_min)
    assert (some.linear(500).cumsum(0) - every.linear(500).cumsum(0)).abs().max() < 0.005 * every.size
    assert same_bins(some, histogram(*batches, sampling=7))  # deterministic


def test_small_tensors_are_taken_whole():
    x = torch.randn(WHOLE)
    assert same_bins(histogram(x, sampling=1000), histogram(x))


@pytest.mark.parametrize("shape", [(8, 14, 49, 49), (8, 64, 28, 28), (4, 7, 7 * 13, 13 * 11), (32, 16, 32, 32)])
@pytest.mark.parametrize("sampling", [2, 4, 7, 13])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_channel_row_or_column_is_favoured(shape, sampling, layout):
    for dim in range(4):
        size = shape[dim]
        place = torch.arange(1, size + 1).view([-1 if d == dim else 1 for d in range(4)])
        x = place.expand(shape).float().contiguous(memory_format=layout)
        made = histogram(x, sampling=sampling)
        shares = made.filled()[2] / made.size
        assert len(shares) == size
        assert (shares * size - 1).abs().max() < 0.02


# ---- the methods ---------------------------------------------------------------------------------------------------


def test_minmax_is_the_largest_value_or_the_moving_average_of_both_ends(data):
    made = histogram(*data)
    assert threshold(made, "minmax") == made.largest
    for shift in (0.0, -3.0):  # the plugin follows both ends apart, so that either may set the range
        batches = [d + shift for d in data]
        low, high = float(batches[0].min()), float(batches[0].max())
        for batch in batches[1:]:
            low += 0.1 * (float(batch.min()) - low)
            high += 0.1 * (float(batch.max()) - high)
        averaged = threshold(histogram(*batches), "minmax", averaging_constant=0.1)
        assert averaged == pytest.approx(max(-low, high))


@pytest.mark.parametrize("method", ["percentile", "mse", "kl", "mix", "clip_std"])
def test_with_a_constant_each_batch_has_a_threshold_and_they_are_averaged(method, data):
    made = histogram(*data, by_batch=True)
    low = high = None
    for batch in data:
        own = threshold(histogram(batch), method)
        ends = max(float(batch.min()), -own), min(float(batch.max()), own)
        low, high = ends if low is None else (low + 0.3 * (ends[0] - low), high + 0.3 * (ends[1] - high))
    averaged = threshold(made, method, averaging_constant=0.3)
    assert averaged == pytest.approx(max(-low, high), rel=1e-3)
    assert threshold(made, method) == threshold(histogram(*data), method)  # without the constant, all values at once
    last = threshold(made, method, averaging_constant=1.0)
    assert last == pytest.approx(threshold(histogram(data[-1]), method), rel=1e-3)


def test_with_a_constant_small_batches_miss_outliers():
    x = torch.randn(64, 2_000, generator=torch.Generator().manual_seed(0))
    x[::16] *= 20.0  # every 16th sample
    for method in ("minmax", "percentile", "mse", "kl", "mix", "clip_std"):
        found = [
            threshold(histogram(*x.roll(-1, 0).split(size), by_batch=True), method, averaging_constant=0.01)
            for size in (4, 16)
        ]
        assert found[0] < 0.7 * found[1], method


def test_a_constant_needs_batches(data):
    with pytest.raises(DataError, match="needs statistics of each batch, but got none. Calibrate with it"):
        threshold(histogram(*data), "mse", averaging_constant=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_percentile_is_exact_to_half_a_bin(shape, data):
    values = SHAPES[shape](torch.cat(data))
    made = histogram(*values.split(7_000))
    for percent in (99.0, 99.9, 99.99):
        exact = float(np.quantile(values.abs().double().numpy(), percent / 100, method="inverted_cdf"))
        assert made.percentile(percent) == pytest.approx(exact, rel=1 / (2 * PER_OCTAVE))
    assert made.percentile(100.0) == made.largest


def direct_error(x, threshold, dtype):
    step = threshold / -dtype.qmin
    return float(((x / step).round().clamp(dtype.qmin, dtype.qmax) * step - x).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mse_is_close_to_the_best_threshold(shape, dtype, data):
    values = SHAPES[shape](torch.cat(data))
    chosen = histogram(*values.split(7_000)).threshold(dtype, CalibrationSettings(), "mse")
    values = values.double()
    best = min(direct_error(values, t, dtype) for t in torch.linspace(0.05, 1, 96).double() * values.abs().max())
    assert direct_error(values, chosen, dtype) <= 1.07 * best


@pytest.mark.parametrize("shape", SHAPES)
def test_the_squared_error_is_that_of_the_values(shape, data):
    values = SHAPES[shape](torch.cat(data)).double()
    made = histogram(values.float())
    for dtype in DTYPES:
        for share in (0.3, 0.6, 0.9):
            expected = direct_error(values.abs(), share * made.largest, dtype)
            got = float(made.squared_error(torch.tensor([share * made.largest]).double(), dtype))
            assert got == pytest.approx(expected, rel=0.03), (dtype, share)


@pytest.mark.parametrize("shape", SHAPES)
def test_mix_is_the_percentile_of_least_error(shape, data):
    values = SHAPES[shape](torch.cat(data)).double()
    chosen = threshold(histogram(values.float()), "mix")
    exact = [float(np.quantile(values.abs().numpy(), p / 100, method="inverted_cdf")) for p in MIX_PERCENTILES]
    best = min(direct_error(values, t, QDtype.qint8) for t in exact)
    assert direct_error(values, chosen, QDtype.qint8) <= 1.03 * best
    assert min(abs(chosen / t - 1) for t in exact) <= 1 / (2 * PER_OCTAVE)


def direct_divergences(counts):
    """The textbook loop: TensorRT's calibration as the plugin has it, one edge at a time."""
    counts = counts.clone()
    counts[0] = counts[1]
    found = []
    for edge in range(KL_LEVELS, len(counts) + 1):
        kept, rest = counts[:edge], counts[edge:].sum()
        p, q = kept.clone(), torch.zeros(edge, dtype=torch.float64)
        p[-1] += rest
        level = torch.tensor([(j * KL_LEVELS) // edge for j in range(edge)])
        for one in range(KL_LEVELS):
            members = (level == one) & (kept > 0)
            if members.any():
                q[members] = kept[members].sum() / members.sum()
        q[(q == 0) & (p > 0)] = 1.0
        p, q = p / p.sum(), q / q.sum()
        found.append(float((p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum()))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_is_the_textbook_loop(shape, data):
    made = histogram(SHAPES[shape](data[0]))
    counts = made.linear(512)  # the loop is slow
    expected = direct_divergences(counts)
    assert torch.allclose(divergences(counts), expected, rtol=1e-9, atol=1e-12)
    smooth = [float(expected[i : i + KL_WINDOW].sum()) for i in range(len(expected) - KL_WINDOW + 1)]
    index = max(i for i, s in enumerate(smooth) if s <= min(smooth) * (1 + 1e-12))
    assert least_divergence(counts, 0.0) == KL_LEVELS + index + KL_WINDOW // 2
    # Values beyond the last edge are clipped at every edge, like those in further bins would be.
    further = torch.cat([counts, torch.tensor([0.0, 5.0])])
    assert torch.allclose(divergences(counts, 5.0), divergences(further)[:-2], rtol=1e-9, atol=1e-12)
    assert 0 < threshold(made, "kl") <= made.largest


def test_kl_and_percentile_cut_outliers_that_minmax_keeps():
    torch.manual_seed(0)
    made = histogram(torch.cat([torch.randn(100_000), torch.tensor([100.0])]))
    for method in ("kl", "percentile", "clip_std"):
        assert threshold(made, method) < 50, method


def test_kl_keeps_values_that_are_all_far_from_zero():
    x = torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0)) / 3)
    assert threshold(histogram(x), "kl") > histogram(x).percentile(95.0)


@pytest.mark.parametrize("far", [1e3, 1e5, -1e30])
def test_a_far_value_costs_the_others_no_resolution(far):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    clean, made = histogram(*x.split(50_000)), histogram(*x.split(50_000), torch.tensor([far]))
    for percent in (50.0, 99.0, 99.9, 99.99):
        assert made.percentile(percent) == pytest.approx(clean.percentile(percent), rel=0.01)
    assert clean.near == clean.largest
    assert made.near == pytest.approx(clean.largest, rel=1 / PER_OCTAVE)
    for method in ("percentile", "kl"):  # both cut it off, at both integer dtypes
        assert threshold(made, method) == pytest.approx(threshold(clean, method), rel=0.05), method
        assert threshold(made, method, QDtype.qint16) == pytest.approx(1.25 * made.near), method
    for method in ("mse", "mix", "minmax"):  # alone, it makes more squared error than all others together
        assert threshold(made, method) == threshold(made, method, QDtype.qint16) / 1.25 == made.largest, method


def test_int16_clips_a_far_value_where_this_lowers_the_squared_error():
    made = histogram(torch.cat([torch.full((300,), 2.0**-14), torch.tensor([0.0021])]))
    made.bins.counts[0] *= 1e9  # as if there were very many ordinary values, each on the coarse grid's half step
    assert made.near < made.largest
    fine, coarse = made.squared_error(torch.tensor([made.near, made.largest]).double() * 1.25, QDtype.qint16)
    assert fine < coarse
    assert threshold(made, "mse", QDtype.qint16) == 1.25 * made.near


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.floats(100.0, 1e6), st.integers(0, 1000))
def test_only_a_few_values_that_are_far_from_all_others_are_far(few, size, seed):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(seed))
    x[:few] = size
    made = histogram(x)
    assert (made.near < made.largest) == (size > 32 * histogram(x[few:]).percentile(100 * (1 - 1e-4)) * 1.1) or (
        100 < size < 200  # close to the bound the exact value of the percentile decides
    )
    x[:40] = size  # 0.02 % of the values: too many to be readings gone wrong
    assert histogram(x).near == histogram(x).largest


def test_kl_is_not_fooled_by_the_spike_of_a_relu():
    torch.manual_seed(0)
    made = histogram(torch.relu(torch.randn(200_000)))
    assert threshold(made, "kl") > 2.5  # with the spike in, it would clip the bulk


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_std_keeps_so_many_deviations_around_the_mean(shape, data):
    values = SHAPES[shape](torch.cat(data)).double()
    made = histogram(*values.float().split(7_000))
    for k in (1.5, 3.0, 50.0):
        mean, reach = float(values.mean()), k * float(values.std(unbiased=True))
        exact = max(-max(float(values.min()), mean - reach), min(float(values.max()), mean + reach))
        assert threshold(made, "clip_std", std_scale=k) == pytest.approx(exact, rel=1e-4)


def test_clip_cuts_both_ends_to_the_range():
    made = histogram(torch.tensor([-0.3, 0.2]), torch.tensor([-2.0, 5.0]))
    assert threshold(made, "clip") == 1.0
    assert threshold(made, "clip", clip_min=-3.0, clip_max=1.0) == 2.0
    assert threshold(made, "clip", clip_min=-1.0, clip_max=7.0) == 5.0
    assert threshold(histogram(torch.tensor([-0.3, 0.2])), "clip") == pytest.approx(0.3)
    # The plugin's constant of 1 keeps the last batch only.
    last = histogram(torch.tensor([-2.0, 5.0]), torch.tensor([-0.3, 0.2]))
    assert threshold(last, "clip", averaging_constant=1.0) == pytest.approx(0.3)
    # Values on the other side of 0 than the range: a scale of 0 would wipe them out.
    assert threshold(histogram(torch.tensor([-2.0, -0.5])), "clip", clip_min=0.0) == 1.0


# ---- properties ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(SHAPES)), st.floats(1e-6, 1e6))
def test_no_method_exceeds_the_largest_value(seed, shape, size):
    x = SHAPES[shape](torch.randn(3_000, generator=torch.Generator().manual_seed(seed))) * size
    made = histogram(*x.split(1_000))
    for method in CUTTING:
        found = threshold(made, method, clip_min=-2 * size, clip_max=2 * size)
        assert 0 < found <= made.largest * (1 + 1e-12), method


def test_the_order_of_batches_matters_to_moving_averages_only(data):
    forth, back = histogram(*data), histogram(*data[::-1])
    for method in METHODS:
        assert threshold(back, method) == pytest.approx(threshold(forth, method), rel=1e-6), method
    growing = {"averaging_constant": 0.01}
    assert threshold(forth, "minmax", **growing) < 0.7 * threshold(back, "minmax", **growing)


# ---- dtypes and settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_int16_takes_the_largest_value_with_a_margin_whatever_the_method(method, data):
    made = histogram(*data)
    settings = CalibrationSettings(method=method)
    assert made.threshold(QDtype.qint16, settings) == pytest.approx(1.25 * made.largest)
    assert made.scale(QDtype.qint16, settings) == pytest.approx(1.25 * made.largest / 32768)


def test_an_operator_may_ask_for_a_method_of_its_own(data):
    made, settings = histogram(*data), CalibrationSettings(method="minmax")
    for method in METHODS:
        assert made.threshold(QDtype.qint8, settings, method) == threshold(made, method), method
    assert made.threshold(QDtype.qint16, settings, "percentile") == made.percentile(99.99)
    assert made.threshold(QDtype.qint16, settings, "minmax") == 1.25 * made.largest
    with pytest.raises(ConfigError, match="kl is for qint8, but got qint16"):
        made.scale(QDtype.qint16, settings, "kl")


def test_the_scale_is_the_guides_arithmetic():
    made = histogram(torch.tensor([0.9984]))
    assert made.scale(QDtype.qint8, CalibrationSettings(method="minmax")) == pytest.approx(0.0078)  # 0.0078 x 128
    plugin = CalibrationSettings(method="minmax", divisor="plugin")
    assert made.scale(QDtype.qint8, plugin) == pytest.approx(0.9984 / 127.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "max"},
        {"percentile": 10.0},
        {"batch_size": 0},
        {"divisor": "127"},
        {"steps": -1},
        {"sampling": 0},
        {"std_scale": 0.0},
        {"clip_min": 2.0},
        {"clip_min": -math.inf},
        {"clip_max": math.nan},
    ],
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        CalibrationSettings(**wrong)
