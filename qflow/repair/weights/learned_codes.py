"""Codes of a weight that are learned: AdaRound's rectified sigmoid between two neighbouring codes.

For a float weight w with scale s and present code q (Nagel et al., ICML 2020, arXiv 2004.10568, equations 22 to 24):

    w(V) = s (low + h(V)),     h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    low  = q if w / s >= q, else q - 1: the other choice lies on the side of the float weight
    regulariser = mean(1 - |2 h(V) - 1|^beta): it draws h to 0 or 1, the more the smaller beta

The paper starts from h = w / s - low, with which w(V) is the float weight. Here the present codes are good already, so
h starts half way between that and the present code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.values.fake_quant import FakeQuant
from qflow.repair.weights.columns import as_rows, from_rows
from qflow.repair.weights.rounding import grid_of, stored

STRETCH = 0.1
"""How far the sigmoid reaches beyond 0 and 1 before it is cut off, so that it reaches both."""
NEAR = 0.02
"""Least distance of h from 0 and 1 at the start: beyond them it has no gradient."""


class LearnedCodes:
    """The present codes of one weight, and `v`, which is trained; rows as in columns.py."""

    def __init__(self, leaf: WeightedLeaf, quantizer: FakeQuant, original: Tensor, bits: int = 8) -> None:
        """`original` is the float weight before the batch norm is folded in; `leaf` has the present codes."""
        self.leaf, self.grid = leaf, grid_of(leaf, quantizer, bits)
        stride, self.codes = self.grid.stride, self.grid.nearest(self.grid.weight)
        folded = original if leaf.qflow_norm is None else original * leaf.along_output(leaf.factor())
        bias = leaf.folded()[1]
        self.wanted, self.bias = folded.detach(), None if bias is None else bias.detach()
        wanted, at = as_rows(leaf, self.wanted.double()) / self.grid.scale / stride, self.codes / stride
        lowest, highest = -(-self.grid.lowest // stride), 128 // stride - 1
        self.low = torch.where(wanted >= at, at, at - 1).clamp(lowest, highest - 1)
        middle = ((wanted - self.low).clamp(0, 1) + (at - self.low).clamp(0, 1)) / 2
        sigmoid = (middle.clamp(NEAR, 1 - NEAR) + STRETCH) / (1 + 2 * STRETCH)
        self.v = torch.log(sigmoid / (1 - sigmoid)).float().requires_grad_()
        self.start, self.step = (self.codes * self.grid.scale).float(), (self.grid.scale * stride).float()

    def shares(self) -> Tensor:
        """h(V): 0 stands for the lower code, 1 for the upper one."""
        return (torch.sigmoid(self.v) * (1 + 2 * STRETCH) - STRETCH).clamp(0.0, 1.0)

    def soft(self) -> tuple[Tensor, Tensor | None]:
        """The weight between two codes, with a gradient for `v`, and the bias."""
        rows = torch.where(self.grid.held, self.start, (self.low.float() + self.shares()) * self.step)
        return from_rows(self.leaf, rows).to(self.leaf.weight), self.bias

    def hard(self) -> Tensor:
        """The codes that `v` stands for now."""
        codes = (self.low + (self.shares().detach() >= 0.5)) * self.grid.stride
        return torch.where(self.grid.held, self.codes, codes)

    def undecided(self, beta: float) -> Tensor:
        """The regulariser, over the weights that have a choice."""
        free = ~self.grid.held
        distance = 1 - (2 * self.shares() - 1).abs().pow(beta)
        return (distance * free).sum() / free.sum().clamp_min(1)

    def fixed(self, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight with these codes, and the bias."""
        return from_rows(self.leaf, codes * self.grid.scale).to(self.leaf.weight), self.bias

    def original(self) -> tuple[Tensor, Tensor | None]:
        """The float weight, batch norm folded in, and the bias."""
        return self.wanted, self.bias

    def float_weight(self, codes: Tensor) -> Tensor:
        """The float weight with these codes, before the batch norm is folded in (rounding.py)."""
        return stored(self.leaf, self.grid, codes)
