"""The rounding noise that a group of channels has in int8, as a function of the factors of its variables.

An activation has one scale, its largest value / 127.5, and a weight one for each row; errors are independent, of
variance step^2 / 12. With r_c and m_c the largest |x| and the mean square of input channel c, W the folded weight of a
consumer and n its kernel elements, the noise of output o is

    activation   sum over tensors T   max_{c in T} (r_c s_c)^2 / 127.5^2 / 12 x sum_{c in T} |W_oc|^2 / s_c^2
    weight       max_c (|W_oc|max / s_c)^2 / 127.5^2 / 12 x n sum_c m_c s_c^2

where T are the tensors with a scale of their own between the producers and the consumer. For a product of two
activations q and k, W is the mean square of the other side:

    sum over tensors T of q   max (r_c s_c)^2 / 127.5^2 / 12 x sum_c m^k_c / s_c^2
    sum over tensors T of k   max (r_c / s_c)^2 / 127.5^2 / 12 x sum_c m^q_c s_c^2

Each is divided by its signal, sum_c |W_oc|^2 m_c or sum_c m^q_c m^k_c, and averaged over the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CODES = 127.5


@dataclass(frozen=True)
class Reach:
    """A tensor with a scale: the numbers of its channels' factors, their largest |x|, and which channels are read."""

    index: Tensor
    largest: Tensor
    reads: Tensor

    def variance(self, factors: Tensor) -> float:
        """The variance of its rounding error."""
        return float((self.largest * factors[self.index]).max() / CODES) ** 2 / 12

    def relative(self, factors: Tensor) -> Tensor:
        """The ranges of its channels, relative to the largest."""
        scaled = self.largest * factors[self.index]
        return scaled / scaled.max().clamp(min=1e-30)


@dataclass(frozen=True)
class WeightNoise:
    """What the formula needs of one consumer; c is a channel of a group of a grouped convolution.

    `energy` and `peak` [groups, outputs, c] are |W_oc|^2 and the largest |W_oc|; `index` [groups, c] are the numbers of
    the factors, `power` [groups, c] the mean squares of the input.
    """

    energy: Tensor
    peak: Tensor
    elements: int
    index: Tensor
    power: Tensor
    reaches: tuple[Reach, ...]

    def noise(self, factors: Tensor) -> float:
        """The noise relative to the signal."""
        f, power = factors[self.index].unsqueeze(1), self.power.unsqueeze(1)
        rows = (self.peak / f).amax(2) / CODES
        noise = rows.square() / 12 * self.elements * (power * f.square()).sum(2)
        energy = self.energy / f.square()
        for reach in self.reaches:
            noise = noise + reach.variance(factors) * (energy * reach.reads.unsqueeze(1)).sum(2)
        return _relative(noise, (self.energy * power).sum(2))

    def column(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of the factors, and the ranges of the columns relative to the largest of their row."""
        peak = self.peak / factors[self.index].unsqueeze(1)
        return self.index.flatten(), (peak / peak.amax(2, keepdim=True).clamp(min=1e-30)).amax(1).flatten()


@dataclass(frozen=True)
class PairNoise:
    """What the formula needs of a product of two activations: `index` and both mean squares are [products, c]."""

    index: Tensor
    left: Tensor
    right: Tensor
    left_reaches: tuple[Reach, ...]
    right_reaches: tuple[Reach, ...]

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """The tensors of both sides."""
        return (*self.left_reaches, *self.right_reaches)

    def noise(self, factors: Tensor) -> float:
        """The noise relative to the signal."""
        square = factors[self.index].square()
        noise = torch.zeros(len(self.index), dtype=torch.float64)
        for reach in self.left_reaches:
            noise = noise + reach.variance(factors) * (self.right / square * reach.reads).sum(1)
        for reach in self.right_reaches:
            noise = noise + reach.variance(factors) * (self.left * square * reach.reads).sum(1)
        return _relative(noise, (self.left * self.right).sum(1))


def total(noises: Sequence[WeightNoise | PairNoise], factors: Tensor) -> float:
    """The noise of a group: the sum over its consumers and pairs."""
    return sum(noise.noise(factors) for noise in noises)


def _relative(noise: Tensor, signal: Tensor) -> float:
    alive = signal > 1e-12 * signal.max()
    return float((noise[alive] / signal[alive]).mean()) if bool(alive.any()) else 0.0
