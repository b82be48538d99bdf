"""Calibration statistics: one streaming histogram serves every method and every integer dtype.

Each quantizer sees all calibration values once, in 2048 bins of |x| whose range doubles exactly when a larger
value comes (pairs of bins merge, nothing is lost). From it every method is solved afterwards:

    minmax      the largest |x|; with an averaging constant c, the moving average of batch maxima (plugin: 0.01)
    percentile  the |x| below which `percentile` % of the values lie (plugin: 99.99, 2048 bins)
    mse         the threshold of least expected squared error on the dtype's own grid
    kl          the threshold whose 128-level histogram is closest in KL divergence (TensorRT's method); every 16th
                bin edge is tried, where the plugin tries each and smooths over 9
    mix         among percentiles 99.9 .. 99.9999 the one of least squared error (the plugin's candidates)

The scale follows as threshold / -qmin (guide: 0.0078 x 128 = 0.9984), or / 127.5 with divisor "plugin".
int16 clips sooner than it rounds badly: minmax with a margin of 1.25 is used for it whatever the method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.errors import DataError
from qflow.core.settings import CalibrationSettings

BINS = 2048
MIX_PERCENTILES = (99.9, 99.95, 99.99, 99.993, 99.995, 99.997, 99.999, 99.9995, 99.9999)
KL_LEVELS = 128
TINY = 1e-30  # below this the bin width leaves float32: such a tensor counts as zero


@dataclass
class Histogram:
    """Streaming statistics of one tensor over the calibration data (|x|; symmetric quantization needs no sign)."""

    limit: float = 0.0
    """Upper edge of the last bin; 0 until a non-zero value came."""
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    zeros: float = 0.0
    """Exact zeros (ReLU outputs, padding): they cost no error at any scale."""
    batch_max: list[float] = field(default_factory=list)

    def update(self, x: Tensor, name: str) -> None:
        """Take in one batch of values. Raises DataError if they are not all finite."""
        if x.numel() == 0:
            return
        magnitude = x.detach().abs().flatten()
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise DataError(f"Calibration needs finite values, but got {largest} at {name}. Check data and model.")
        if largest < TINY:
            largest = 0.0
        self.batch_max.append(largest)
        if largest == 0.0:
            self.zeros += magnitude.numel()
            return
        if self.limit == 0.0:
            self.limit = largest
        while largest > self.limit:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2, dtype=torch.float64)])
            self.limit *= 2.0
        index = magnitude.float().mul_(BINS / self.limit).to(torch.int32).clamp_(max=BINS - 1)
        counts = torch.bincount(index, minlength=BINS).to("cpu", torch.float64)
        zeros = float(magnitude.numel() - torch.count_nonzero(magnitude))
        counts[0] -= zeros
        self.zeros += zeros
        self.counts += counts

    @property
    def largest(self) -> float:
        """The largest |x| seen; 0 for a tensor that was always zero or never seen."""
        return max(self.batch_max, default=0.0)

    @property
    def seen(self) -> bool:
        """True if any value came."""
        return bool(self.batch_max)

    def threshold(self, dtype: QDtype, settings: CalibrationSettings) -> float:
        """The |x| that the largest code stands for, by `settings.method` (int16: minmax with margin)."""
        if self.largest == 0.0:
            return 0.0
        if dtype == QDtype.qint16:
            return self.largest * settings.int16_margin
        if settings.method == "minmax":
            return self._moving_average(settings.averaging_constant)
        if settings.method == "percentile":
            return self.percentile(settings.percentile)
        if settings.method == "mix":
            candidates = torch.tensor([self.percentile(p) for p in MIX_PERCENTILES], dtype=torch.float64)
            return float(candidates[self.squared_error(candidates, dtype).argmin()])
        if settings.method == "kl":
            return self._least_divergence()
        candidates = self.largest * torch.linspace(0.05, 1.0, 96, dtype=torch.float64)
        return float(candidates[self.squared_error(candidates, dtype).argmin()])

    def scale(self, dtype: QDtype, settings: CalibrationSettings) -> float:
        """Step of the grid: threshold / 128 (int8) or / 32768 (int16); half a step more range with "plugin"."""
        divisor = -dtype.qmin - (0.5 if settings.divisor == "plugin" else 0.0)
        return self.threshold(dtype, settings) / divisor

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

    def _moving_average(self, constant: float | None) -> float:
        if constant is None:
            return self.largest
        value = self.batch_max[0]
        for batch in self.batch_max[1:]:
            value += constant * (batch - value)
        return value

    def _least_divergence(self) -> float:
        """Threshold of least KL(P || Q): P clipped at the threshold, Q the same in 128 levels.

        The first bin is replaced by the second: its spike at zero would swamp the rest (measured: 4.5 dB).
        """
        counts = self.counts.clone()
        counts[0] = counts[1]
        best, best_edge = math.inf, BINS
        for edge in range(KL_LEVELS, BINS + 1, 16):
            kept = counts[:edge]
            p = kept.clone()
            p[-1] += counts[edge:].sum()
            level = (torch.arange(edge) * KL_LEVELS) // edge
            filled = (kept > 0).to(torch.float64)
            mass = torch.zeros(KL_LEVELS, dtype=torch.float64).index_add_(0, level, kept)
            bins = torch.zeros(KL_LEVELS, dtype=torch.float64).index_add_(0, level, filled)
            q = (mass / bins.clamp_min(1.0))[level] * filled
            # A bin that Q leaves empty (only the clipped tail lands there) costs as if it held one count.
            q = torch.where((q == 0) & (p > 0), torch.ones_like(q), q)
            p, q = p / p.sum(), q / q.sum()
            hold = p > 0
            divergence = float((p[hold] * (p[hold] / q[hold]).log()).sum())
            if divergence <= best:
                best, best_edge = divergence, edge
        return min(best_edge * self.limit / BINS, self.largest)
