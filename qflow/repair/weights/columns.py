"""What the weight of an operator is multiplied with: its inputs as columns, and their second moments.

A convolution multiplies its weight, as a matrix [output channels / groups, inputs], with a column for each sample and
output position: the input values under the kernel. For H = X X^T, [groups, inputs, inputs], a change D of one row of
the weight changes the squared error of the output by D H D^T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qflow.quant.model.weighted import LinearLeaf, WeightedLeaf
from qflow.repair.base.operators import transposed

POSITIONS = 64
"""Output positions of a sample that enter H; neighbours hold nearly the same values."""


def groups_of(leaf: WeightedLeaf) -> int:
    """The number of groups of a convolution; 1 of a linear layer."""
    return int(getattr(leaf, "groups", 1))


def as_rows(leaf: WeightedLeaf, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as [groups, output channels / groups, inputs], in the order of `columns`."""
    groups = groups_of(leaf)
    if transposed(leaf):  # [inputs, outputs / groups, ...]
        grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        return grouped.transpose(1, 2).reshape(groups, weight.shape[1], -1)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_rows(leaf: WeightedLeaf, rows: Tensor) -> Tensor:
    """The inverse of `as_rows`."""
    shape = leaf.weight.shape
    if transposed(leaf):
        groups = groups_of(leaf)
        grouped = rows.reshape(groups, shape[1], shape[0] // groups, *shape[2:])
        return grouped.transpose(1, 2).reshape(shape)
    return rows.reshape(shape)


def columns(leaf: WeightedLeaf, input: Tensor, generator: torch.Generator) -> Tensor:
    """Columns of a batch, [groups, inputs, columns]: at most `POSITIONS` positions, the same of each sample."""
    if isinstance(leaf, LinearLeaf):
        rows = input.reshape(input.shape[0] if input.ndim > 2 else 1, -1, input.shape[-1])
        if input.ndim > 2:
            rows = rows[:, _positions(rows.shape[1], generator)]
        return rows.reshape(1, -1, input.shape[-1]).transpose(1, 2)
    windows = _windows(leaf, input)
    spatial = leaf.weight.ndim - 2
    sizes = windows.shape[2 : 2 + spatial]
    places = torch.unravel_index(_positions(sizes.numel(), generator), sizes)
    every: Any = slice(None)
    chosen = windows[(every, every, *places)]  # [samples, channels, positions, kernel...]
    if transposed(leaf):
        chosen = chosen.flip(list(range(3, chosen.ndim)))
    samples, channels, positions = chosen.shape[:3]
    groups = groups_of(leaf)
    chosen = chosen.reshape(samples, groups, channels // groups, positions, -1)
    return chosen.permute(1, 2, 4, 0, 3).reshape(groups, -1, samples * positions)


def _positions(count: int, generator: torch.Generator) -> Tensor:
    """At most `POSITIONS` of `count` positions, drawn without regularity, so that none of a stride of theirs is hit."""
    if count <= POSITIONS:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:POSITIONS].sort().values


def _windows(leaf: WeightedLeaf, input: Tensor) -> Tensor:
    """A view of the padded input as [samples, channels, output positions..., kernel...], without a copy of values.

    A transposed convolution is a convolution of stride 1 over its input with stride - 1 zeros between the values, by
    the kernel turned round; the windows are those of the turned kernel.
    """
    conv: Any = leaf
    spatial = leaf.weight.ndim - 2
    x = input if input.ndim == leaf.weight.ndim else input.unsqueeze(0)
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if transposed(leaf):
        apart = x.new_zeros(*x.shape[:2], *[(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)])
        apart[(slice(None), slice(None), *[slice(None, None, s) for s in stride])] = x
        ends = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, conv.padding, strict=True)]
        pads = [(end, end + more) for end, more in zip(ends, conv.output_padding, strict=True)]
        x = F.pad(apart, [p for pair in reversed(pads) for p in pair])
        stride = (1,) * spatial
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    x = x.contiguous()
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, d, k, s in zip(x.shape[2:], dilation, kernel, stride, strict=True)]
    steps = x.stride()[2:]
    return x.as_strided(
        (*x.shape[:2], *sizes, *kernel),
        (
            *x.stride()[:2],
            *(step * s for step, s in zip(steps, stride, strict=True)),
            *(step * d for step, d in zip(steps, dilation, strict=True)),
        ),
    )
