"""Codes of a weight that keep the output of its operator: GPTQ's rule, with the codes of int8 that a weight may take.

A weight is a matrix for each group of the operator, [groups, rows, inputs] (columns.py), all in float64. The output's
squared error over the samples is, for a change D of one row, D H D^T with H = X X^T of the inputs X. Rounding to
nearest has the least error in the weight, not in the output. The rule of GPTQ (Frantar et al., ICLR 2023, arXiv
2210.17323) rounds the columns one after the other, those with the largest inputs first, and lets the columns that are
left take over the error:

    H^-1 = U^T U with U upper triangular
    e_j = (w_j - s_j q_j) / U_jj,     w_k <- w_k - e_j U_jk  for k > j
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors are handed on to all later columns in one product


@dataclass(frozen=True)
class Grid:
    """A weight and the codes that its values may take; all tensors are [groups, rows, inputs]."""

    weight: Tensor
    scale: Tensor
    held: Tensor
    """True for the largest |w| of each scale: it keeps its nearest code, so that the scale stays."""
    lowest: int = -128
    """Lowest code of the other values."""
    stride: int = 1
    """Codes are multiples of it: 4 gives the 64 codes of 6 bits."""

    def nearest(self, values: Tensor, column: int | slice = slice(None)) -> Tensor:
        """The nearest codes of `values`, which stand in place of `weight` in one column or in all."""
        scale, held, weight = (t[..., column] for t in (self.scale, self.held, self.weight))
        low, high = -(-self.lowest // self.stride), 128 // self.stride - 1
        codes = (values / (scale * self.stride)).round().clamp(low, high) * self.stride
        return torch.where(held, (weight / scale).round().clamp(-128, 127), codes)

    def in_order(self, order: Tensor) -> Grid:
        """The same with the columns of each group in this order, [groups, inputs]."""
        at = order[:, None, :].expand_as(self.weight)
        weight, scale, held = (t.gather(2, at) for t in (self.weight, self.scale, self.held))
        return replace(self, weight=weight, scale=scale, held=held)

    def errors(self, codes: Tensor, moments: Tensor) -> Tensor:
        """D H D^T of each row, [groups, rows]."""
        return squared(codes * self.scale - self.weight, moments)


def squared(rows: Tensor, moments: Tensor) -> Tensor:
    """D H D^T of each row D, [groups, rows]."""
    return ((rows @ moments) * rows).sum(2).clamp_min(0.0)


def second_order(grid: Grid, moments: Tensor) -> Tensor:
    """Codes by GPTQ's rule (module docstring); `moments` is H, [groups, inputs, inputs], positive definite."""
    order = moments.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    columns = order[:, None, :].expand_as(moments)
    upper = _upper(moments.gather(2, columns).gather(1, order[:, :, None].expand_as(moments)))
    ordered = grid.in_order(order)
    left, codes = ordered.weight.clone(), torch.empty_like(ordered.weight)
    inputs = left.shape[2]
    for begin in range(0, inputs, BLOCK):
        end = min(begin + BLOCK, inputs)
        errors = torch.zeros_like(left[..., begin:end])
        for j in range(begin, end):
            codes[..., j] = ordered.nearest(left[..., j], j)
            error = (left[..., j] - codes[..., j] * ordered.scale[..., j]) / upper[:, j, j, None]
            left[..., j + 1 : end] -= error[..., None] * upper[:, None, j, j + 1 : end]
            errors[..., j - begin] = error
        left[..., end:] -= errors @ upper[:, begin:end, end:]
    return torch.empty_like(codes).scatter_(2, order[:, None, :].expand_as(codes), codes)


def _upper(moments: Tensor) -> Tensor:
    """The upper triangular U with H^-1 = U^T U: of H turned round, the Cholesky factor turned back is U^-1."""
    inverse = torch.linalg.cholesky(moments.flip(1, 2)).flip(1, 2)
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device).expand_as(moments)
    upper: Tensor = torch.linalg.solve_triangular(inverse, identity, upper=True)
    return upper
