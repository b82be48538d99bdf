"""Equalization: channels that share one activation scale get like ranges, by factors that leave the float function.

A homogeneous operator lets a factor pass, so a producer's channel can be multiplied by s and the columns that read it
divided by s (Nagel et al. 2019, cross-layer equalization; with a norm's affine part as producer it is the folding of
Xiao et al. 2023). In int8 an activation has one scale, its largest value / 127.5, and a weight one for each row. With
r_c and m_c the largest |x| and the mean square of input channel c, W the folded weight of a consumer, n its kernel
elements, the rounding noise of output o is, with independent errors of variance step^2 / 12,

    activation   max_c (r_c s_c)^2 / 127.5^2 / 12 x sum_c |W_oc|^2 / s_c^2
    weight       max_c (|W_oc|max / s_c)^2 / 127.5^2 / 12 x n sum_c m_c s_c^2

each divided by its signal sum_c |W_oc|^2 m_c, averaged over the outputs and summed over the consumers of a group. The
factors are a fixed point of s_c = (range of the columns)^(1 - a) / (range of the channel)^a, both relative to the
largest of their tensor or row; a = 1/2 is the rule of the paper. Of a = 0, 1/4, ... 1 the one of least noise is taken,
and a group whose noise would fall by less than half is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf
from qflow.repair.channel_ranges import Ranges, channel_ranges
from qflow.repair.channels import Channels, Consumer, Producer
from qflow.repair.contract import Context, Part, Step
from qflow.repair.same_function import moving

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROUNDS = 4
GAIN = 0.5
LIMIT = 2.0**20
CODES = 127.5


@dataclass(frozen=True)
class Scaling:
    """The factors of one group: the rows of each producer times them, the columns of each consumer by them."""

    rows: tuple[tuple[Producer, Tensor], ...]
    columns: tuple[tuple[Consumer, Tensor], ...]
    factors: Tensor
    """Factor of each variable of the group."""
    gain: float
    """Predicted noise afterwards / before."""

    @torch.no_grad()
    def apply(self, exponent: int = 1) -> None:
        """Scale the float weights in place; with exponent -1, take it back (exactly, for powers of two)."""
        for producer, factors in self.rows:
            scale_rows(producer.module, factors**exponent)
        for consumer, factors in self.columns:
            scale_columns(consumer.module, factors**-exponent)


class Equalize(Step):
    """Channel factors through homogeneous operators, group by group."""

    name = "equalize"
    preserving = True

    def __init__(self, gain: float = GAIN) -> None:
        self.gain = gain
        """A group is changed if its predicted noise falls below this share."""

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Mapping[str, str]]:
        """Find the groups, gather the ranges of their channels in one pass, and compute the factors."""
        channels = Channels(prepared)
        refused = {
            path: channels.fixed[channels.find(producer.ids[0])]
            for path, producer in channels.producers.items()
            if all(channels.find(variable) in channels.fixed for variable in producer.ids)
        }
        ranges = channel_ranges(prepared, channels, context)
        parts = []
        for producers, consumers in _groups(channels):
            scaling = _Group(channels, producers, consumers, ranges).scaling(self.gain)
            name = f"{_first(producers)} -> {_first(consumers)}"
            if scaling is None:
                refused[name] = f"its predicted noise falls by less than {1 - self.gain:.0%}"
            else:
                parts.append(Part(name, scaling))
        # the rules of channels.py go by shapes, which leave some doubt: whether x[:, i] takes channels as they are
        wrong = moving(prepared, context, parts, lambda part: part.data.apply(), lambda part: part.data.apply(-1))
        refused |= dict.fromkeys(sorted(wrong), "the float function would move: its channels are taken out of order")
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


def _first(members: Sequence[Producer] | Sequence[Consumer]) -> str:
    return members[0].path + (f" and {len(members) - 1} more" if len(members) > 1 else "")


def _groups(channels: Channels) -> list[tuple[list[Producer], list[Consumer]]]:
    """Producers and consumers that a free variable joins, directly or through others, in order of execution."""
    group_of: dict[int, int] = {}
    members: dict[int, list[int]] = {}
    free = {
        path: {v for v in map(channels.find, member.ids) if v not in channels.fixed}
        for path, member in [*_named(channels.producers, "out"), *_named(channels.consumers, "in")]
    }
    for variables in free.values():
        known = sorted({group_of[v] for v in variables if v in group_of} | (variables - group_of.keys()))
        for other in known[1:]:
            members.setdefault(known[0], [known[0]]).extend(members.pop(other, [other]))
        for v in members.setdefault(known[0], [known[0]]) if known else ():
            group_of[v] = known[0]
    found: dict[int, tuple[list[Producer], list[Consumer]]] = {}
    for path, producer in channels.producers.items():
        for group in {group_of[v] for v in free["out " + path]}:
            found.setdefault(group, ([], []))[0].append(producer)
    for path, consumer in channels.consumers.items():
        for group in {group_of[v] for v in free["in " + path]}:
            found.setdefault(group, ([], []))[1].append(consumer)
    return [pair for pair in found.values() if all(pair)]


def _named(members: Mapping[str, Any], side: str) -> list[tuple[str, Any]]:
    return [(f"{side} {path}", member) for path, member in members.items()]


@dataclass(frozen=True)
class _Columns:
    """What the noise formula needs of one consumer; c is a channel of a group of a grouped convolution.

    `energy` and `peak` [groups, outputs, c] are |W_oc|^2 and the largest |W_oc|; `index` [groups, c] are the variables,
    `power` [groups, c] the mean squares of the input, `sources` the tensors that bring it: variables and ranges.
    """

    energy: Tensor
    peak: Tensor
    elements: int
    index: Tensor
    power: Tensor
    sources: tuple[tuple[Tensor, Tensor], ...]

    def noise(self, factors: Tensor) -> float:
        """The formula at the head of this file, relative to the signal."""
        f = factors[self.index].unsqueeze(1)
        step = max(float((reach * factors[index]).max()) for index, reach in self.sources) / CODES
        rows = (self.peak / f).amax(2) / CODES
        power = self.power.unsqueeze(1)
        activation = step**2 / 12 * (self.energy / f.square()).sum(2)
        weight = rows.square() / 12 * self.elements * (power * f.square()).sum(2)
        signal = (self.energy * power).sum(2)
        alive = signal > 1e-12 * signal.max()
        return float(((activation + weight)[alive] / signal[alive]).mean()) if bool(alive.any()) else 0.0


class _Group:
    """The variables of one group, numbered from 1; 0 is a channel that stays as it is."""

    def __init__(
        self,
        channels: Channels,
        producers: Sequence[Producer],
        consumers: Sequence[Consumer],
        ranges: Mapping[str, Ranges],
    ) -> None:
        self.channels, self.producers, self.consumers = channels, producers, consumers
        roots = [channels.find(variable) for member in producers for variable in member.ids]
        self.number = {v: i for i, v in enumerate(dict.fromkeys(v for v in roots if v not in channels.fixed), 1)}
        self.columns = [self._columns(consumer, ranges) for consumer in consumers]
        self.anchored = any(bool((index == 0).any()) for c in self.columns for index, _ in c.sources)

    def index(self, ids: Sequence[int]) -> Tensor:
        """The numbers of these variables."""
        return torch.tensor([self.number.get(self.channels.find(variable), 0) for variable in ids])

    def _columns(self, consumer: Consumer, ranges: Mapping[str, Ranges]) -> _Columns:
        weight = _by_output(consumer.module)
        groups, _, count, elements = weight.shape
        read = [ranges[name] for name in consumer.sources if name in ranges]
        power = torch.stack([r.power for r in read]).mean(0) if read else torch.zeros(groups * count)
        graph, labels = self.channels.graph, self.channels.labels
        sources = []
        for name in dict.fromkeys(s for source in consumer.sources for s in (source, *graph.source(source))):
            known = labels.get(name)
            if known is not None and name in ranges:
                sources.append((self.index(known.ids), ranges[name].largest))
        return _Columns(
            weight.square().sum(3), weight.abs().amax(3), elements, self.index(consumer.ids).view(groups, count),
            power.view(groups, count), tuple(sources),
        )  # fmt: skip

    def scaling(self, gain: float) -> Scaling | None:
        """Return the factors of least predicted noise, or None if they gain too little."""
        columns = [c for c in self.columns if c.sources]
        if not columns:
            return None
        count = 1 + len(self.number)
        best = plain = torch.ones(count, dtype=torch.float64)
        least = before = sum(c.noise(plain) for c in columns)
        for exponent in EXPONENTS:
            factors = plain
            for _ in range(ROUNDS):
                factors = self._moved(columns, factors, exponent)
                exact = factors.log2().round().exp2()
                noise = sum(c.noise(exact) for c in columns)
                if noise < least:
                    best, least = exact, noise
        if best is plain or least >= gain * before:
            return None
        rows = tuple((p, best[self.index(p.ids)]) for p in self.producers)
        divided = tuple((c, best[self.index(c.ids)]) for c in self.consumers)
        return Scaling(rows, divided, best[1:], least / before)

    def _moved(self, columns: Sequence[_Columns], factors: Tensor, exponent: float) -> Tensor:
        """One step to the fixed point: ranges of channels and of columns as these factors leave them."""
        channel, column = torch.zeros_like(factors), torch.zeros_like(factors)
        for c in columns:
            for index, reach in c.sources:
                scaled = reach * factors[index]
                channel.scatter_reduce_(0, index, scaled / scaled.max().clamp(min=1e-30), "amax")
            peak = c.peak / factors[c.index].unsqueeze(1)
            peak = (peak / peak.amax(2, keepdim=True).clamp(min=1e-30)).amax(1)
            column.scatter_reduce_(0, c.index.flatten(), peak.flatten(), "amax")
        alive = (channel > 0) & (column > 0)
        alive[0] = False
        ones = torch.ones_like(factors)
        channel, column = torch.where(alive, channel, ones), torch.where(alive, column, ones)
        moved = factors * column ** (1 - exponent) / channel**exponent
        if not self.anchored and bool(alive.any()):  # only ratios count: as many grow as shrink
            moved = torch.where(alive, moved / moved[alive].log().mean().exp(), moved)
        return moved.clamp(1 / LIMIT, LIMIT)


def _by_output(module: WeightedLeaf) -> Tensor:
    """The folded weight as [groups, outputs of a group, inputs of a group, kernel elements], float64."""
    weight = module.folded()[0].detach().double().cpu()
    groups = int(getattr(module, "groups", 1))
    if getattr(module, "transposed", False):
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def scale_rows(module: Any, factors: Tensor) -> None:
    """Multiply each output channel: of the batch norm after a convolution, else of weight and bias."""
    norm = getattr(module, "qflow_norm", None)
    if norm is not None or not isinstance(module, WeightedLeaf):
        affine = module if norm is None else norm
        for vector in (affine.weight, getattr(affine, "bias", None)):
            if vector is not None:
                vector.mul_(factors.to(vector))
        return
    weight, groups = module.weight, int(getattr(module, "groups", 1))
    along = factors.to(weight)
    if getattr(module, "transposed", False):
        grouped = weight.view(groups, weight.shape[0] // groups, -1)
        grouped.mul_(along.view(groups, 1, -1).repeat_interleave(weight[0, 0].numel(), dim=2))
    else:
        weight.mul_(along.view(-1, *[1] * (weight.ndim - 1)))
    if module.bias is not None:
        module.bias.mul_(along)


def scale_columns(module: Any, factors: Tensor) -> None:
    """Multiply what a weight reads of each input channel."""
    weight, groups = module.weight, int(getattr(module, "groups", 1))
    along = factors.to(weight)
    if getattr(module, "transposed", False):
        weight.mul_(along.view(-1, *[1] * (weight.ndim - 1)))
        return
    for rows, own in zip(weight.chunk(groups), along.chunk(groups), strict=True):
        rows.mul_(own.view(1, -1, *[1] * (weight.ndim - 2)))
