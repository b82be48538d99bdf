"""Calibration statistics: one pass over the data is enough for every method and every integer dtype.

The values of each quantizer are counted once, in bins of |x| whose width is 1/512 to 1/256 of the value
(values/bins.py), so that one far value costs the others no resolution. The smallest and largest value of each batch and
two moments are kept too. From these statistics every method of the plugin (observer_v2) computes a threshold T on |x|:

    minmax      max(-min x, max x), exact
    percentile  the value below which `percentile` % of all values lie (plugin: 99.99), exact to half a bin, 0.2 %; the
                largest value is exact. If it is 0, because nearly all values are, that of the values which are not 0
    mse         among 0.05 .. 1.00 of the largest |x|, and of the largest near one, the T of least squared error on the
                dtype's own grid (on a tie the smaller). The plugin shrinks by the wrong factor for a stride above 1;
                here every candidate is tried
    kl          the T whose 128-level histogram is closest in KL divergence, among the edges of 1024 equal bins up to
                the largest near |x| (plugin: 512 up to the largest; see values/divergence.py)
    mix         among percentiles 99.9 .. 99.9999, the one of least squared error, the smallest on a tie (plugin)
    clip        minmax with the ends clamped into [clip_min, clip_max] (the plugin's ClipObserver uses the last batch
                only; averaging constant 1 does the same), exact
    clip_std    minmax with the ends clamped to mean +- std_scale * unbiased std, over all batches (the plugin's
                ClipStdObserver, k = 3, uses mean and std of each batch), exact to float32 sums

A value is far if it exceeds 32 times the largest of all but 0.01 % of the values that are not 0 (of all but one, if
there are fewer than 10000; there are none among fewer than 256): a scale that covers it leaves those others less than 4
of the 128 codes of int8. All other values are near.

The scale is T / -qmin (guide: 0.0078 x 128 = 0.9984), or T / 127.5 with divisor "plugin". int16 suffers from clipping
before it suffers from rounding, so it takes the largest |x| x int16_margin, unless the operator itself sets a method.
Far values are clipped at int16 too by percentile and kl, and by mse and mix where this lowers the squared error.

With an averaging constant c (plugin: 0.01), the ends of each batch, clamped to the batch's own threshold, enter a
moving average, v += c (v_batch - v), which starts with the first batch. Each batch then keeps its bins: 12 KB at most.

Only every `sampling`-th value enters bins and moments, but at least 65536 values of a batch; smallest and largest
are always those of all values. Measured with every 7th value against all (ResNet-20, MobileNetV2, U-Net, 95 quantizers,
when bins were linear; median / worst): percentile 99.99 off by 0.25 / 6 %, error of mse and mix above least 0 / 8 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.errors import DataError
from qflow.core.op_spec import check_op
from qflow.core.settings import CalibrationSettings
from qflow.quant.values.bins import SMALLEST, LogBins, placed, quantization_error, spread
from qflow.quant.values.divergence import KL_BINS, least_divergence
from qflow.quant.values.sample import ends_of, sample_of

MIX_PERCENTILES = (99.9, 99.95, 99.99, 99.993, 99.995, 99.997, 99.999, 99.9995, 99.9999)
FAR = 32.0  # module docstring: when a value is far
FAR_SHARE = 1e-4
FAR_VALUES = 256


@dataclass
class Histogram:
    """Streaming statistics of one tensor over the calibration data."""

    sampling: int = CalibrationSettings.sampling
    """Every n-th value enters bins and moments; 1 uses all."""
    bins: LogBins = field(default_factory=LogBins)
    """Number of values in each bin; a sampled value counts as many times as the values that it represents."""
    zeros: float = 0.0
    """Number of exact zeros (ReLU outputs, padding): they have no error at any scale."""
    infinite: int = 0
    """Number of +-inf values (attention masks): they enter no other statistic."""
    total: float = 0.0
    squares: float = 0.0
    batch_min: list[float] = field(default_factory=list)
    batch_max: list[float] = field(default_factory=list)
    by_batch: bool = False
    """Keep the statistics of each batch too, for moving averages."""
    batches: list[Histogram] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._thresholds: dict[Any, float] = {}  # many trials ask for the same one, and mse takes milliseconds

    def update(self, x: Tensor, name: str) -> None:
        """Add one batch of values. Raises DataError for NaN."""
        x = x.detach()
        low, high = ends_of(x, name)
        if math.isinf(low) or math.isinf(high):
            kept = x[torch.isfinite(x)]
            self.infinite += x.numel() - kept.numel()
            x, (low, high) = kept, ends_of(kept, name)
        if x.numel() == 0:
            return
        largest = max(-low, high)
        if largest < SMALLEST:
            low = high = largest = 0.0
        batch = Histogram(batch_min=[low], batch_max=[high])
        if largest == 0.0:
            batch.zeros = float(x.numel())
        else:
            batch._count(sample_of(x, self.sampling, len(self.batch_max) + 1), x.numel())
        self._merge(batch)
        if self.by_batch:
            batch.bins = batch.bins.thinned()
            self.batches.append(batch)

    def _count(self, sample: Tensor, number: int) -> None:
        """Count `sample`, which stands for `number` values."""
        sample = sample.float().contiguous()  # else each kernel below would stride through memory
        weight, largest = number / sample.numel(), self.largest
        scaled = sample.mul(1.0 / largest)  # so sums of squares cannot overflow, even with large mask values
        self.total = weight * largest * float(scaled.sum())
        self.squares = weight * largest**2 * float(scaled.dot(scaled))
        self.bins, self.zeros = LogBins.of(sample, weight, largest)

    def _merge(self, batch: Histogram) -> None:
        self.bins.merge(batch.bins)
        self.zeros, self.total = self.zeros + batch.zeros, self.total + batch.total
        self.squares += batch.squares
        self.batch_min += batch.batch_min
        self.batch_max += batch.batch_max
        self._thresholds.clear()

    @property
    def largest(self) -> float:
        """The largest finite |x| seen; 0 for a tensor that was always zero or never seen."""
        return max(-min(self.batch_min, default=0.0), max(self.batch_max, default=0.0))

    @property
    def near(self) -> float:
        """The largest |x| that is not far from nearly all others (module docstring); exact to a bin if any is far."""
        _, upper, counts = self.filled()
        total = float(counts.sum())
        if total < FAR_VALUES:
            return self.largest
        cumulative = counts.cumsum(0)
        most = int(torch.searchsorted(cumulative, total - max(total * FAR_SHARE, 1.0)))
        bound = FAR * float(upper[most])
        return self.largest if self.largest <= bound else float(upper[upper <= bound][-1])

    @property
    def seen(self) -> bool:
        """True if there was any finite value."""
        return bool(self.batch_max)

    def threshold(self, dtype: QDtype, settings: CalibrationSettings, method: str | None = None) -> float:
        """The threshold on |x| by `method` (the operator's own), else by `settings.method`.

        int16 takes minmax with the margin unless `method` is given. Raises ConfigError for kl at int16.
        """
        check_op({"output": dtype, "observer": method}, "calibration")
        if self.largest == 0.0:
            return 0.0
        key = dtype, settings, method
        if key not in self._thresholds:
            self._thresholds[key] = self._threshold(dtype, settings, method)
        return self._thresholds[key]

    def _threshold(self, dtype: QDtype, settings: CalibrationSettings, method: str | None) -> float:
        if dtype == QDtype.qint16 and method in (None, "minmax"):
            return self._covering(method or settings.method, dtype) * settings.int16_margin
        method = method or settings.method
        if settings.averaging_constant is not None and method not in ("minmax", "clip"):
            return self._averaged(dtype, settings, method, settings.averaging_constant)
        if method == "percentile":
            return self.cut(settings.percentile)
        if method == "kl":
            near = self.near
            return least_divergence(*placed(self.filled(), near, KL_BINS)) * near / KL_BINS
        if method in ("mse", "mix"):
            found = self._shares() if method == "mse" else [self.cut(percent) for percent in MIX_PERCENTILES]
            return self._least_error(found, dtype)
        low, high = self.ends(settings.averaging_constant)
        if method == "clip":
            return self._clamped(low, high, settings.clip_min, settings.clip_max)
        if method == "clip_std":
            mean, reach = self.mean, settings.std_scale * self.std
            return self._clamped(low, high, mean - reach, mean + reach)
        assert method == "minmax", method
        return max(-low, high)

    def scale(self, dtype: QDtype, settings: CalibrationSettings, method: str | None = None) -> float:
        """Step of the grid: threshold / 128 (int8) or / 32768 (int16); 127.5 and 32767.5 with divisor "plugin"."""
        divisor = -dtype.qmin - (0.5 if settings.divisor == "plugin" else 0.0)
        return self.threshold(dtype, settings, method) / divisor

    def percentile(self, percent: float) -> float:
        """The value at which the cumulative count of |x| (zeros included) reaches `percent` %."""
        return self._at(self.size * percent / 100.0)

    def cut(self, percent: float) -> float:
        """`percentile`, but where nearly all values are 0 that of the others: a threshold of 0 would wipe them out."""
        return self.percentile(percent) or self._at(self.zeros + (self.size - self.zeros) * percent / 100.0)

    def squared_error(self, thresholds: Tensor, dtype: QDtype) -> Tensor:
        """Expected summed squared quantization error for each threshold ([K] float64); see values/bins.py."""
        return quantization_error(self.filled(), thresholds, dtype)

    def linear(self, number: int) -> Tensor:
        """Counts in `number` equal bins of 0 .. `largest`, without zeros; a wider logarithmic bin is spread evenly."""
        return spread(self.filled(), self.largest, number)

    def filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lower edges, upper edges and counts of the bins that hold values, ascending."""
        return self.bins.filled(self.largest)

    def beyond(self, threshold: float, most: float = math.inf) -> tuple[float, float]:
        """(share of the values above `threshold`, mean over all values of the squared error of clipping them).

        Values above `most` are left out.
        """
        lower, upper, counts = self.filled()
        over = ((lower + upper) / 2 - threshold).clamp_min_(0.0).masked_fill_(lower >= most, 0.0)
        size = max(self.size, 1.0)
        return float(counts[over > 0].sum()) / size, float(over.square() @ counts) / size

    @property
    def size(self) -> float:
        """Number of finite values."""
        return self.zeros + float(self.bins.counts.sum())

    @property
    def mean(self) -> float:
        """Mean of the finite values."""
        return self.total / self.size if self.size else 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the finite values, unbiased (n - 1)."""
        spread = self.squares - self.size * self.mean**2
        return math.sqrt(max(spread, 0.0) / (self.size - 1.0)) if self.size > 1.0 else 0.0

    def ends(self, constant: float | None = None) -> tuple[float, float]:
        """Smallest and largest value; with an averaging constant, their moving averages over batches."""
        if constant is None:
            return min(self.batch_min), max(self.batch_max)
        return _moving(self.batch_min, constant), _moving(self.batch_max, constant)

    def _averaged(self, dtype: QDtype, settings: CalibrationSettings, method: str, constant: float) -> float:
        """Both ends of each batch are clamped to the batch's own threshold; then they enter a moving average."""
        if not self.batches:
            raise DataError("An averaging constant needs statistics of each batch, but got none. Calibrate with it.")
        whole = replace(settings, averaging_constant=None)
        thresholds = [batch.threshold(dtype, whole, method) for batch in self.batches]
        low = _moving([max(low, -t) for low, t in zip(self.batch_min, thresholds, strict=True)], constant)
        high = _moving([min(high, t) for high, t in zip(self.batch_max, thresholds, strict=True)], constant)
        return max(-low, high)

    def _clamped(self, low: float, high: float, floor: float, ceiling: float) -> float:
        low, high = (min(max(end, floor), ceiling) for end in (low, high))
        # If no value is on the side of 0 where the clip range is, nothing is left: then the range itself is used.
        return max(-low, high) if max(-low, high) > 0.0 else min(max(-floor, ceiling), self.largest)

    def _covering(self, method: str, dtype: QDtype) -> float:
        """The largest |x|; the largest near one for methods that cut outliers, or if its squared error is lower."""
        near = self.near
        if near < self.largest and method in ("mse", "mix"):
            return self._least_error([near, self.largest], dtype)
        return near if method in ("percentile", "kl") else self.largest

    def _least_error(self, thresholds: list[float], dtype: QDtype) -> float:
        candidates = torch.tensor(thresholds, dtype=torch.float64)
        return thresholds[int(self.squared_error(candidates, dtype).argmin())]  # the first minimum

    def _shares(self) -> list[float]:
        shares = np.linspace(0.05, 1.0, 96)
        return [float(share * most) for most in dict.fromkeys([self.near, self.largest]) for share in shares]

    def _at(self, rank: float) -> float:
        """The value of |x| at a rank, 0 .. size: the centre of its bin, or the largest value."""
        if rank > self.size - 1.0:
            return self.largest
        lower, upper, counts = self.filled()
        index = int(torch.searchsorted(counts.cumsum(0) + self.zeros, rank))
        return 0.0 if rank <= self.zeros else float(lower[index] + upper[index]) / 2


def _moving(values: list[float], constant: float) -> float:
    """The moving average v += c (v_batch - v), which starts with the first batch."""
    found = values[0]
    for value in values[1:]:
        found += constant * (value - found)
    return found
