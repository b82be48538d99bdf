"""What a factor changes in a model: rows and columns of weights, and vectors such as the affine part of a norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qflow.quant.model.weighted import WeightedLeaf


@dataclass(frozen=True)
class Matrix:
    """The weight and bias of a convolution or linear layer: parameters, or views of parameters."""

    weight: Tensor
    bias: Tensor | None
    groups: int = 1
    transposed: bool = False
    leaf: WeightedLeaf | None = None
    """The module, None for a functional; its batch norm is folded into it."""

    @property
    def columns(self) -> int:
        """The number of input channels."""
        return int(self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups)

    @torch.no_grad()
    def scale_rows(self, factors: Tensor) -> None:
        """Multiply each output channel."""
        along = factors.to(self.weight)
        if self.transposed:
            self._grouped().mul_(along.view(self.groups, 1, -1, *[1] * (self.weight.ndim - 2)))
        else:
            self.weight.mul_(along.view(-1, *[1] * (self.weight.ndim - 1)))
        if self.bias is not None:
            self.bias.mul_(along)

    @torch.no_grad()
    def scale_columns(self, factors: Tensor) -> None:
        """Multiply what the weight reads of each input channel."""
        along = factors.to(self.weight)
        if self.transposed:
            self.weight.mul_(along.view(-1, *[1] * (self.weight.ndim - 1)))
        else:
            self._grouped().mul_(along.view(self.groups, 1, -1, *[1] * (self.weight.ndim - 2)))

    def _grouped(self) -> Tensor:
        """The weight as [groups, channels of a group, ...], in the same memory."""
        weight = self.weight.detach()
        return weight.view(self.groups, weight.shape[0] // self.groups, *weight.shape[1:])

    def by_output(self) -> Tensor:
        """The folded weight as [groups, outputs of a group, inputs of a group, kernel elements], float64."""
        weight = (self.weight if self.leaf is None else self.leaf.folded()[0]).detach().double().cpu()
        rows = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        return rows.transpose(1, 2) if self.transposed else rows


@dataclass(frozen=True)
class Vectors:
    """Vectors of one value a channel: weight and bias of a norm, or a parameter that is multiplied or added."""

    tensors: tuple[Tensor, ...]

    @torch.no_grad()
    def scale_rows(self, factors: Tensor) -> None:
        """Multiply each value."""
        for tensor in self.tensors:
            tensor.mul_(factors.to(tensor).view(tensor.shape))


@dataclass(frozen=True)
class Read:
    """A tensor of which channels are read: result `position` of the operator call `name`, and its axes of channels.

    `sizes` are those of the axes; a longer axis of a value is a multiple (windows and heads beside the batch).
    """

    name: str
    position: int
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    ndim: int


@dataclass(frozen=True, eq=False)
class Source:
    """A tensor with a scale of its own upstream: its noise reaches what reads these channels."""

    read: Read
    ids: Tensor


@dataclass(frozen=True)
class Producer:
    """Channels with variables of their own [channels], and what holds them."""

    path: str
    ids: Tensor
    holds: Matrix | Vectors


@dataclass
class Consumer:
    """A weight, the variables of the channels that it reads [channels], and where it reads them (one a call)."""

    path: str
    holds: Matrix
    ids: Tensor
    reads: list[Read]
    sources: list[Source]


@dataclass(frozen=True)
class Pair:
    """A product of two activations, summed over channels: `ids` [..., channels] of the left, inverse on the right."""

    path: str
    ids: Tensor
    reads: tuple[Read, Read]
    sources: tuple[Sequence[Source], Sequence[Source]]
