"""Counts of |x| in logarithmic bins, whose resolution is relative and therefore the same whatever the range.

A bin is what the first bits of a float32 decide: its exponent, and 8 bits of its mantissa. So each octave
[2^e, 2^(e+1)) is divided into 256 bins of equal width, 1/512 to 1/256 of the values in it. Such bins are filled by
integer arithmetic, they are the same for all batches and tensors, and they merge by addition. Only octaves that hold a
value are stored. When more than 32 do, the smallest values of all are counted at the lower edge of the 32nd octave from
above: they lie at least 31 octaves below the largest, and no grid resolves both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from qflow.core.dtype import QDtype

BITS = 8
PER_OCTAVE = 2**BITS
MOST_OCTAVES = 32
THIN_OCTAVES = 12
SMALLEST = float(torch.finfo(torch.float32).tiny)  # 2^-126; what is smaller counts as zero
_MANTISSA, _BIAS, _MAGNITUDE = 23, 127, 0x7FFFFFFF  # of IEEE 754 binary32


_NONE = torch.zeros(0, PER_OCTAVE, dtype=torch.float64)
Filled = tuple[Tensor, Tensor, Tensor]
"""Lower edges, upper edges and counts of bins, as from `LogBins.filled`."""


@dataclass
class LogBins:
    """How many values lie in each bin of each octave; the values themselves are not kept."""

    octaves: list[int] = field(default_factory=list)
    """Exponents e of the stored octaves, ascending."""
    counts: Tensor = field(default_factory=lambda: _NONE)
    """[octaves, bins of an octave], float64."""

    @classmethod
    def of(cls, values: Tensor, weight: float, largest: float) -> tuple[LogBins, float]:
        """Bins of the contiguous float32 `values`, each counted `weight` times, and the count of zeros.

        No |value| exceeds `largest`.
        """
        index = values.view(-1).view(torch.int32).bitwise_and(_MAGNITUDE).bitwise_right_shift_(_MANTISSA - BITS)
        octaves = (int(np.float32(largest).view(np.int32)) >> _MANTISSA) + 1
        rows = torch.bincount(index, minlength=octaves * PER_OCTAVE).cpu().view(octaves, PER_OCTAVE)
        sums = rows.sum(1).tolist()
        stored = [row for row in range(1, octaves) if sums[row]]  # row 0 holds zeros and numbers below 2^-126
        made = cls([row - _BIAS for row in stored], rows[_at(stored)].to(torch.float64).mul_(weight))
        made._fold(MOST_OCTAVES)
        return made, sums[0] * weight

    def merge(self, other: LogBins) -> None:
        """Add the counts of `other`. The order of merges does not matter."""
        if not self.octaves:
            self.octaves, self.counts = other.octaves, other.counts.clone()
            return
        union = sorted({*self.octaves, *other.octaves})
        if union != self.octaves:
            own = self.counts
            self.counts = torch.zeros(len(union), PER_OCTAVE, dtype=torch.float64)
            self.counts[[union.index(octave) for octave in self.octaves]] = own
            self.octaves = union
        rows = [union.index(octave) for octave in other.octaves]
        self.counts[_at(rows)] += other.counts
        self._fold(MOST_OCTAVES)

    def thinned(self) -> LogBins:
        """A copy in float32 with the highest 12 octaves, enough for one batch at int8: 12 KB at most."""
        made = LogBins(self.octaves, self.counts)
        made._fold(THIN_OCTAVES)
        return LogBins(made.octaves, made.counts.to(torch.float32))

    def _fold(self, most: int) -> None:
        extra = len(self.octaves) - most
        if extra > 0:
            folded = float(self.counts[:extra].sum())
            self.octaves, self.counts = self.octaves[extra:], self.counts[extra:].clone()
            self.counts[0, 0] += folded

    def filled(self, largest: float) -> Filled:
        """Lower edges, upper edges and counts of the bins that hold values, ascending; no edge exceeds `largest`."""
        start = torch.tensor(self.octaves, dtype=torch.float64).exp2().unsqueeze(1)
        lower = (start * (1.0 + torch.arange(PER_OCTAVE, dtype=torch.float64) / PER_OCTAVE)).flatten()
        upper = lower + (start / PER_OCTAVE).expand(-1, PER_OCTAVE).flatten()
        counts = self.counts.flatten().to(torch.float64)
        held = counts > 0
        return lower[held].clamp_(max=largest), upper[held].clamp_(max=largest), counts[held]


def _at(rows: list[int]) -> slice | list[int]:
    """An index of ascending `rows`: a slice if they are neighbours, as usual, because it is much faster."""
    return slice(rows[0], rows[-1] + 1) if rows and rows[-1] - rows[0] + 1 == len(rows) else rows


def placed(bins: Filled, limit: float, number: int) -> tuple[Tensor, float]:
    """Counts in `number` equal bins of 0 .. `limit`, each logarithmic bin at its centre; and the count beyond."""
    lower, upper, counts = bins
    index = ((lower + upper) * (number / (2 * limit))).ceil_().to(torch.int64) - 1
    within = index < number
    return torch.bincount(index[within], counts[within], number), float(counts[~within].sum())


def spread(bins: Filled, limit: float, number: int) -> Tensor:
    """Counts in `number` equal bins of 0 .. `limit`, each logarithmic bin spread evenly over those that it touches."""
    lower, upper, counts = bins
    if not len(counts):
        return torch.zeros(number, dtype=torch.float64)
    after = counts.cumsum(0)
    ends, held = torch.stack([lower, upper], 1).flatten(), torch.stack([after - counts, after], 1).flatten()
    edges = np.linspace(0.0, limit, number + 1)
    return torch.from_numpy(np.interp(edges, ends.numpy(), held.numpy(), left=0.0)).diff()


def quantization_error(bins: Filled, thresholds: Tensor, dtype: QDtype) -> Tensor:
    """Expected summed squared quantization error of the values in `bins` for each threshold ([K] float64).

    The values are taken to spread evenly over their bin: the error at the centre plus width^2 / 12. Where a bin in the
    range is wider than half a step, it is that of rounding, step^2 / 12.
    """
    lower, upper, counts = bins
    step = (thresholds / -dtype.qmin).unsqueeze(1)
    flat = upper < step.min() / 2  # these round to zero for every threshold: their error is their square
    centre, width = (lower + upper) / 2, upper - lower
    below = ((centre[flat].square() + width[flat].square() / 12.0) * counts[flat]).sum()
    centre, width, counts = centre[~flat], width[~flat], counts[~flat]
    codes = (centre / step).round_().clamp_(max=dtype.qmax)
    error = (codes * step - centre).square_() + width.square() / 12.0
    coarse = (centre <= dtype.qmax * step) & (width > step / 2)
    return torch.where(coarse, step.square() / 12.0, error) @ counts + below
