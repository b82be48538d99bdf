"""Calibration statistics: one pass over the data is enough for every method and every integer dtype.

The values of each quantizer are counted once, in 2048 bins of |x|. When a larger value comes, the range of the bins
doubles exactly (pairs of bins merge, no count is lost). The smallest and largest value of each batch and two moments
are kept too. From these statistics every method of the plugin (observer_v2) computes a threshold T on |x|:

    minmax      max(-min x, max x); with an averaging constant c both ends are moving averages over batches,
                v += c (v_batch - v), starting with the first batch (plugin: 0.01)
    percentile  centre of the first bin at which `percentile` % of all values are reached (plugin: 99.99, 2048 bins)
    mse         among 0.05 .. 1.00 of the largest |x|, the T of least squared error on the dtype's own grid (on a
                tie the smaller). The plugin shrinks by the wrong factor for a stride above 1; here every candidate is
                tried
    kl          the T whose 128-level histogram is closest in KL divergence (TensorRT, Migacz 2017); see `_divergences`
    mix         among percentiles 99.9 .. 99.9999, the one of least squared error, the smallest on a tie (plugin)
    clip        minmax with the ends clamped into [clip_min, clip_max] (the plugin's ClipObserver uses the last batch
                only; averaging constant 1 does the same)
    clip_std    minmax with the ends clamped to mean +- std_scale * unbiased std, over all batches (the plugin's
                ClipStdObserver, k = 3, uses mean and std of each batch)

The scale is T / -qmin (guide: 0.0078 x 128 = 0.9984), or T / 127.5 with divisor "plugin". int16 suffers from clipping
before it suffers from rounding, so it takes the largest |x| x int16_margin, unless the operator itself sets a method.

Only every `sampling`-th value enters bins and moments, but at least 65536 values of a batch; smallest and largest
are always those of all values. Measured against all stored values (ResNet-20, MobileNetV2, U-Net; 8 batches of 8 to
32 pictures, 95 quantizers; median / 90th percentile / worst):

    sampling                                     1                    7
    percentile 99.99, threshold off by   0.04 / 0.15 / 2 %    0.25 / 1.7 / 6 %
    clip_std, threshold off by           0                    0.03 / 0.3 / 0.6 %
    mse, error above the least           0 / 0.2 / 2 %        0 / 1.4 / 6 %
    mix, error above sampling 1                               0 / 0.9 / 8 %
    kl, threshold off from sampling 1                         0.05 / 8 / 15 %      (a flat minimum)
    the pass costs, in float passes      1.8 to 2.3           1.3 to 1.6
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.errors import DataError
from qflow.core.op_spec import check_op
from qflow.core.settings import CalibrationSettings

BINS = 2048
MIX_PERCENTILES = (99.9, 99.95, 99.99, 99.993, 99.995, 99.997, 99.999, 99.9995, 99.9999)
KL_LEVELS = 128
KL_WINDOW = 9
WHOLE = 65536  # at least this many values of a batch are used, so that the tails of small tensors are kept
TINY = 1e-30  # below this, float32 cannot hold the bin width: such a tensor counts as zero


@dataclass
class Histogram:
    """Streaming statistics of one tensor over the calibration data."""

    sampling: int = CalibrationSettings.sampling
    """Every n-th value enters bins and moments; 1 uses all."""
    limit: float = 0.0
    """Upper edge of the last bin; 0 until a non-zero value comes. Bin i holds i < |x| BINS / limit <= i + 1."""
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    """Number of values in each bin; a sampled value counts as many times as the values that it represents."""
    zeros: float = 0.0
    """Number of exact zeros (ReLU outputs, padding): they have no error at any scale."""
    infinite: int = 0
    """Number of +-inf values (attention masks): they enter no other statistic."""
    total: float = 0.0
    squares: float = 0.0
    batch_min: list[float] = field(default_factory=list)
    batch_max: list[float] = field(default_factory=list)

    def update(self, x: Tensor, name: str) -> None:
        """Add one batch of values. Raises DataError for NaN."""
        x = x.detach()
        low, high = _ends(x, name)
        if math.isinf(low) or math.isinf(high):
            kept = x[torch.isfinite(x)]
            self.infinite += x.numel() - kept.numel()
            x, (low, high) = kept, _ends(kept, name)
        if x.numel() == 0:
            return
        largest = max(-low, high)
        if largest < TINY:
            low = high = largest = 0.0
        self.batch_min.append(low)
        self.batch_max.append(high)
        if largest == 0.0:
            self.zeros += x.numel()
            return
        self._widen(largest)
        self._count(x)

    def _widen(self, largest: float) -> None:
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
            self.limit *= 2.0

    def _count(self, x: Tensor) -> None:
        sample = self._sample(x).float().contiguous()  # else each kernel below would stride through memory
        weight, width = x.numel() / sample.numel(), self.limit / BINS
        scaled = sample.mul(1.0 / width)  # so sums of squares cannot overflow, even with large mask values
        self.total += weight * width * float(scaled.sum())
        self.squares += weight * width**2 * float(scaled.dot(scaled))
        # Rounding up gives zeros their own index 0; a value at the limit may round to one index beyond the last.
        index = scaled.abs_().ceil_().clamp_(max=BINS).to(torch.int32)
        counts = torch.bincount(index, minlength=BINS + 1).to("cpu", torch.float64).mul_(weight)
        self.zeros += float(counts[0])
        self.counts += counts[1:]

    def _sample(self, x: Tensor) -> Tensor:
        """Every n-th value in memory order.

        n has no divisor in common with any size, so no row, column or channel is preferred, and the first value
        changes from batch to batch.
        """
        if not x.is_contiguous() and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)  # a view in memory order; the order of values does not matter here
        values = x.flatten()
        step = max(1, min(self.sampling, x.numel() // WHOLE))
        while math.gcd(step, x.numel()) > 1:
            step += 1
        return values[len(self.batch_max) % step :: step]

    @property
    def largest(self) -> float:
        """The largest finite |x| seen; 0 for a tensor that was always zero or never seen."""
        return max(-min(self.batch_min, default=0.0), max(self.batch_max, default=0.0))

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
        if dtype == QDtype.qint16 and method in (None, "minmax"):
            return self.largest * settings.int16_margin
        method = method or settings.method
        if method == "percentile":
            return self.percentile(settings.percentile)
        if method == "kl":
            return self._least_divergence()
        if method in ("mse", "mix"):
            candidates = self._shares() if method == "mse" else self._percentiles()
            return float(candidates[self.squared_error(candidates, dtype).argmin()])  # the first minimum
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
        """Centre of the first bin at which the cumulative count (zeros included) reaches `percent` %."""
        cumulative = self.counts.cumsum(0) + self.zeros
        index = int(torch.searchsorted(cumulative, cumulative[-1] * (percent / 100.0)))
        return min((index + 0.5) * self.limit / BINS, self.largest)

    def squared_error(self, thresholds: Tensor, dtype: QDtype) -> Tensor:
        """Expected summed squared quantization error for each threshold ([K] float64).

        Values are taken at bin centres; where bins are wider than half a step the rounding error is s^2/12.
        """
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.limit / BINS)
        step = (thresholds / -dtype.qmin).unsqueeze(1)
        codes = (centres / step).round().clamp_(max=dtype.qmax)
        error = (codes * step - centres).square()
        coarse = (centres <= dtype.qmax * step) & (self.limit / BINS > step / 2)
        error = torch.where(coarse, (step.square() / 12.0).expand_as(error), error)
        return error @ self.counts

    @property
    def size(self) -> float:
        """Number of finite values."""
        return self.zeros + float(self.counts.sum())

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
        low, high = self.batch_min[0], self.batch_max[0]
        for batch_low, batch_high in zip(self.batch_min[1:], self.batch_max[1:], strict=True):
            low += constant * (batch_low - low)
            high += constant * (batch_high - high)
        return low, high

    def _clamped(self, low: float, high: float, floor: float, ceiling: float) -> float:
        low, high = (min(max(end, floor), ceiling) for end in (low, high))
        # If no value is on the side of 0 where the clip range is, nothing is left: then the range itself is used.
        return max(-low, high) if max(-low, high) > 0.0 else min(max(-floor, ceiling), self.largest)

    def _shares(self) -> Tensor:
        return self.largest * torch.linspace(0.05, 1.0, 96, dtype=torch.float64)

    def _percentiles(self) -> Tensor:
        return torch.tensor([self.percentile(p) for p in MIX_PERCENTILES], dtype=torch.float64)

    def _least_divergence(self) -> float:
        """Threshold of least KL divergence, smoothed over 9 neighbours; the last minimum, as in the plugin."""
        used = min(math.ceil(self.largest * BINS / self.limit), BINS)  # above 1024, because the range only doubles
        smooth = _divergences(self.counts[:used]).unfold(0, KL_WINDOW, 1).sum(1)
        index = int((smooth == smooth.min()).nonzero().max())
        edge = KL_LEVELS + index + KL_WINDOW // 2
        return min(edge * self.limit / BINS, self.largest)


def _ends(x: Tensor, name: str) -> tuple[float, float]:
    """Smallest and largest value, in one device transfer; zeros for an empty tensor. Raises DataError for NaN."""
    if x.numel() == 0:
        return 0.0, 0.0
    low, high = torch.stack([x.amin(), x.amax()]).tolist()  # two reductions: aminmax is slower than both (measured)
    if math.isnan(low) or math.isnan(high):
        raise DataError(f"Calibration takes numbers and infinities, but got nan at {name}. Check data and model.")
    return low, high


def _divergences(counts: Tensor) -> Tensor:
    """KL(P || Q) for every edge 128 .. len(counts): P is clipped at the edge, Q is P in 128 levels.

    P holds the counts below the edge, and those beyond it in its last bin. Q spreads the counts of a level (without
    those beyond the edge) evenly over its bins that are not empty. Both are normalized to 1. The first bin is replaced
    by the second, because its spike at zero would dominate (measured: 4.5 dB). With cumulative sums over bins,

        KL = (sum p log p - sum_levels p log q) / N - log N + log N_Q

    takes 128 terms for each edge. If the last bin holds only counts from beyond the edge, Q gets one count there.
    """
    counts = counts.clone()
    counts[0] = counts[1]
    filled = counts > 0
    mass, bins, entropy = (
        torch.cat([torch.zeros(1, dtype=torch.float64), part.to(torch.float64).cumsum(0)])
        for part in (counts, filled, torch.xlogy(counts, counts))
    )
    edges = torch.arange(KL_LEVELS, len(counts) + 1)
    # Bin j belongs to level floor(128 j / edge), so level l starts at bin ceil(l edge / 128).
    starts = -((-torch.arange(KL_LEVELS + 1) * edges.unsqueeze(1)) // KL_LEVELS)
    level_mass, level_bins = mass[starts].diff(dim=1), bins[starts].diff(dim=1)
    level = (level_mass / level_bins.clamp_min(1.0)).clamp_min(0.0)
    total, kept = mass[-1], mass[edges]
    rest = total - kept
    last, hollow = counts[edges - 1], ~filled[edges - 1] & (rest > 0)
    p_log_p = entropy[edges] - torch.xlogy(last, last) + torch.xlogy(last + rest, last + rest)
    q_last = torch.where(hollow, torch.ones_like(last), level[:, -1])
    p_log_q = torch.xlogy(level_mass, level).sum(1) + torch.xlogy(rest, q_last)
    size = kept + hollow
    return (p_log_p - p_log_q) / total - total.log() + size.log()
