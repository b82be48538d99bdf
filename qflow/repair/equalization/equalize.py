"""Equalization: channels that share one activation scale get like ranges, by factors that leave the float function.

A homogeneous operator lets a factor pass, so a producer's channel can be multiplied by s and the columns that read it
divided by s (Nagel et al. 2019, cross-layer equalization; with a norm's affine part as producer it is the folding of
Xiao et al. 2023), and a channel of a query can be multiplied by s if that of the key is divided by it. The factors are
a fixed point of s_c = (range of the columns)^(1 - a) / (range of the channel)^a, both relative to the largest of their
tensor or row; a = 1/2 is the rule of the paper. Of a = 0, 1/4, ... 1 the one of least predicted noise is taken
(predicted_noise.py), and a group whose noise would fall by too little is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import ReplayError
from qflow.quant.trace.calling import cut
from qflow.repair.base.contract import Context, Part, Step
from qflow.repair.equalization.channel_groups import Group, groups
from qflow.repair.equalization.channel_ranges import Ranges, channel_ranges
from qflow.repair.equalization.channel_weights import Consumer, Pair, Producer, Read, Source
from qflow.repair.equalization.channels import Channels
from qflow.repair.equalization.predicted_noise import PairNoise, Reach, WeightNoise, total
from qflow.repair.equalization.same_function import moving

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROUNDS = 4
GAIN = 0.7
LIMIT = 2.0**20


@dataclass(frozen=True)
class Scaling:
    """The factors of one group: the rows of each producer times them, the columns of each consumer by them."""

    rows: tuple[tuple[Producer, Tensor], ...]
    columns: tuple[tuple[Consumer, Tensor], ...]
    factors: Tensor
    """Factor of each variable of the group."""
    gain: float
    """Predicted noise afterwards / before."""

    def apply(self, exponent: int = 1) -> None:
        """Scale the float weights in place; with exponent -1, take it back (exactly, for powers of two)."""
        for producer, factors in self.rows:
            producer.holds.scale_rows(factors**exponent)
        for consumer, factors in self.columns:
            consumer.holds.scale_columns(factors**-exponent)


class Equalize(Step):
    """Channel factors through homogeneous operators, group by group."""

    name = "equalize"
    preserving = True

    def __init__(self, gain: float = GAIN) -> None:
        self.gain = gain
        """A group is changed if its predicted noise falls below this share."""

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Mapping[str, str]]:
        """Find the groups, gather the ranges of their channels in one pass, and compute the factors."""
        inputs, size = context.batches[0]
        try:
            channels = Channels(prepared, cut(inputs, size, 0, 1))
        except ReplayError as error:
            return [], {"the model": f"its channels cannot be followed: {error.reason}"}
        context.forwards += 1
        refused = {
            producer.path: channels.variables.reason(float(producer.ids[0]))
            for producer in channels.producers.values()
            if not channels.variables.free(producer.ids)
        }
        found = groups(channels)
        reads = [read for group in found for read in group.reads()]
        ranges = channel_ranges(prepared, reads, channels.results, context)
        parts = []
        for group in found:
            scaling = _Fit(channels, group, ranges).scaling(self.gain)
            if scaling is None:
                refused[group.name] = f"its predicted noise falls by less than {1 - self.gain:.0%}"
            else:
                parts.append(Part(group.name, scaling))
        # channels are followed on one sample, and code may compute a weight from a parameter before it reads it
        wrong = moving(prepared, context, parts, lambda part: part.data.apply(), lambda part: part.data.apply(-1))
        refused |= dict.fromkeys(
            sorted(wrong), "the float function would move: its weights are read in another way too"
        )
        return [part for part in parts if part.name not in wrong], refused

    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        """Multiply rows (of the batch norm after a convolution, if there is one) and divide columns."""
        changed = {}
        for part in parts:
            scaling: Scaling = part.data
            scaling.apply()
            low, high = float(scaling.factors.min()), float(scaling.factors.max())
            text = f"{len(scaling.factors)} channels by {low:.3g} to {high:.3g}, predicted noise x {scaling.gain:.2g}"
            changed[part.name] = text
        return changed


class _Fit:
    """The factors of one group. Its n variables are numbered 1 to n; 0 is a channel that stays as it is.

    `factors` [2 n + 1] are 1, those of the variables, and their inverses.
    """

    def __init__(self, channels: Channels, group: Group, ranges: Mapping[Read, Ranges]) -> None:
        self.variables, self.group, self.ranges = channels.variables, group, ranges
        roots = self.variables.free_roots(torch.cat([member.ids for member in group.producers]))
        self.count = len(roots)
        self.numbers = torch.zeros(len(self.variables), dtype=torch.long)
        self.numbers[roots] = torch.arange(1, self.count + 1)
        noises = [self._weight(c) for c in group.consumers] + [self._pair(p) for p in group.pairs]
        self.noises = [noise for noise in noises if noise is not None and noise.reaches]
        reaches = [reach for noise in self.noises for reach in noise.reaches]
        self.anchored = bool(group.pairs) or any(bool((reach.index == 0).any()) for reach in reaches)
        """True if the size of the factors counts, not only their ratios."""

    def index(self, ids: Tensor) -> Tensor:
        """The places of these ids' factors."""
        signed = self.variables.of(ids)
        numbers = self.numbers[signed.abs()]
        return torch.where((signed < 0) & (numbers > 0), numbers + self.count, numbers)

    def _weight(self, consumer: Consumer) -> WeightNoise | None:
        weight = consumer.holds.by_output()
        shape, read = (weight.shape[0], weight.shape[2]), [self.ranges[r] for r in consumer.reads if r in self.ranges]
        if not read:
            return None
        index, power = self.index(consumer.ids).view(shape), torch.stack([r.power for r in read]).mean(0).view(shape)
        reaches = self._reaches(consumer.sources, index)
        return WeightNoise(weight.square().sum(3), weight.abs().amax(3), weight.shape[3], index, power, reaches)

    def _pair(self, pair: Pair) -> PairNoise | None:
        if any(read not in self.ranges for read in pair.reads):
            return None
        index = self.index(pair.ids)
        left, right = (self.ranges[read].power.expand(index.shape).flatten(0, -2) for read in pair.reads)
        index = index.flatten(0, -2)
        inverse = self.index(-pair.ids).flatten(0, -2)
        sources = pair.sources
        return PairNoise(index, left, right, self._reaches(sources[0], index), self._reaches(sources[1], inverse))

    def _reaches(self, sources: Sequence[Source], read: Tensor) -> tuple[Reach, ...]:
        """The tensors whose noise is read in channels of these numbers."""
        found = []
        for source in sources:
            if source.read in self.ranges:
                index = self.index(source.ids.flatten())
                found.append(Reach(index, self.ranges[source.read].largest.flatten(), torch.isin(read, index).double()))
        return tuple(found)

    def scaling(self, gain: float) -> Scaling | None:
        """Return the factors of least predicted noise, or None if they gain too little."""
        if not self.noises:
            return None
        best = plain = torch.ones(self.count, dtype=torch.float64)
        least = before = total(self.noises, _with_inverse(plain))
        for exponent in EXPONENTS:
            factors = plain
            for _ in range(ROUNDS):
                factors = self._moved(factors, exponent)
                exact = factors.log2().round().exp2()
                noise = total(self.noises, _with_inverse(exact))
                if noise < least:
                    best, least = exact, noise
        if best is plain or least >= gain * before:
            return None
        whole = _with_inverse(best)
        rows = tuple((p, whole[self.index(p.ids)]) for p in self.group.producers)
        divided = tuple((c, whole[self.index(c.ids)]) for c in self.group.consumers)
        return Scaling(rows, divided, best, least / before)

    def _moved(self, factors: Tensor, exponent: float) -> Tensor:
        """One step to the fixed point: ranges of channels and of columns as these factors leave them.

        A factor whose inverse stands on the other side of a product takes equal ranges to both.
        """
        n, whole = self.count, _with_inverse(factors)
        channel, column, size = (torch.zeros_like(whole) for _ in range(3))
        for noise in self.noises:
            for reach in noise.reaches:
                channel.scatter_reduce_(0, reach.index, reach.relative(whole), "amax")
            if isinstance(noise, WeightNoise):
                column.scatter_reduce_(0, *noise.column(whole), "amax")
            else:
                for reach in (*noise.left_reaches[:1], *noise.right_reaches[:1]):
                    size.scatter_reduce_(0, reach.index, reach.largest * whole[reach.index], "amax")
        channel, column, size, other = channel[1 : n + 1], column[1 : n + 1], size[1 : n + 1], size[n + 1 :]
        alive, paired, ones = (channel > 0) & (column > 0), (size > 0) & (other > 0), torch.ones_like(factors)
        channel, column = torch.where(alive, channel, ones), torch.where(alive, column, ones)
        moved = factors * column ** (1 - exponent) / channel**exponent
        if not self.anchored and bool(alive.any()):  # as many grow as shrink
            moved = torch.where(alive, moved / moved[alive].log().mean().exp(), moved)
        moved = torch.where(paired, factors * torch.where(paired, other / size, ones).sqrt(), moved)
        return self._beside(paired, moved).clamp(1 / LIMIT, LIMIT)

    def _beside(self, paired: Tensor, factors: Tensor) -> Tensor:
        """Values that share a tensor with queries and keys fill the range that those have: more would cost them codes.

        Their factors are multiplied by one number; less would cost the values codes, and gain nothing.
        """
        whole, free = _with_inverse(factors), torch.cat([torch.zeros(1, dtype=torch.bool), ~paired, ~paired])
        ratios = []
        for reach in {id(reach): reach for noise in self.noises for reach in noise.reaches}.values():
            scaled, own = reach.largest * whole[reach.index], free[reach.index]
            if bool(paired.any()) and bool(own.any()) and not bool(own.all()) and float(scaled[own].max()) > 0:
                ratios.append(float(scaled[~own].max() / scaled[own].max()))
        return torch.where(paired, factors, factors * min(ratios, default=1.0))


def _with_inverse(factors: Tensor) -> Tensor:
    return torch.cat([torch.ones(1, dtype=factors.dtype), factors, 1 / factors])
