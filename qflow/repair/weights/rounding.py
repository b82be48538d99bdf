"""Second-order rounding: the int8 codes of the weights that keep the outputs of the operators.

Each operator's inputs are taken from the quantized model, and its codes are chosen by second_order.py for

    H' = H + 0.01 mean(diag H) I,     H = X X^T of the quantized inputs

A row keeps its nearest codes where these have the smaller D H' D^T. The new float weight is scale * code, divided by
the factor of the batch norm that is folded in, so that the fake quantizer gives exactly that code. The scale stays what
it is, also in a later calibration: the largest |w| of each scale keeps its nearest code and its float value, and no
other value exceeds it. (With the divisor 127.5 this value lies on a tie between two codes, as before.)

It costs one pass over the samples for each 1 GB of H, and the linear algebra: for a weight of n inputs, about 2 n^3 / 3
for its triangular factors and n^2 for each output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import DEAD, WeightedLeaf
from qflow.quant.trace.calling import call_model
from qflow.quant.values.fake_quant import FakeQuant
from qflow.repair.base.operators import Run, Skipped, visiting, writable_leaves
from qflow.repair.weights.columns import POSITIONS, as_rows, columns, from_rows
from qflow.repair.weights.second_order import Grid, second_order, squared

DAMPING = 0.01
LARGEST = 4608
"""Inputs of the largest weight that is rounded, 3 x 3 x 512: its H takes 85 MB and its inverse seconds."""
MEMORY = 2**30
"""Bytes of the H of all operators that one pass collects."""
PASSES = 4
"""Passes over the samples at most."""
CHUNK = 2**24
"""Values of the columns that are held at a time."""


@dataclass(frozen=True)
class Rounded:
    """New codes of one weight, as the float weight that has them."""

    weight: Tensor
    before: float
    """sqrt(sum D H D^T / sum W H W^T) with the nearest codes: the relative error of the output."""
    after: float
    moved: float
    """Share of the codes that are not the nearest."""

    def __str__(self) -> str:
        return f"error of its output {self.before:.3g} -> {self.after:.3g}, {self.moved:.0%} of the codes moved"


def writable(prepared: QuantizedModel) -> tuple[dict[str, WeightedLeaf], Skipped]:
    """The operators whose int8 weight can be rounded anew, and why others cannot. int16 weights are in neither."""
    found, skipped = writable_leaves(prepared)
    sizes = {name: as_rows(leaf, leaf.weight).shape[-1] for name, leaf in found.items()}
    chosen = {name: leaf for name, leaf in found.items() if sizes[name] <= LARGEST}
    skipped |= {
        name: f"its {size} inputs an output are more than the limit of {LARGEST}"
        for name, size in sizes.items()
        if name not in chosen
    }
    late = [name for group in in_memory(chosen)[PASSES:] for name in group]
    skipped |= dict.fromkeys(late, f"H of its inputs does not fit into {PASSES} passes of {MEMORY >> 20} MB")
    return {name: leaf for name, leaf in chosen.items() if name not in skipped}, skipped


def in_memory(chosen: Mapping[str, WeightedLeaf]) -> list[list[str]]:
    """The operators in groups, one for each pass, whose H fit into memory together."""
    groups: list[list[str]] = []
    left = 0
    for name, leaf in chosen.items():
        count, _, inputs = as_rows(leaf, leaf.weight).shape
        size = 4 * count * inputs**2
        if size > left:
            groups.append([])
            left = MEMORY
        groups[-1].append(name)
        left -= size
    return groups


@torch.no_grad()
def round_weights(
    prepared: QuantizedModel, batches: Sequence[Any], only: Collection[str] | None = None, bits: int = 8
) -> dict[str, Rounded]:
    """Round the int8 weights of a calibrated model in eval mode anew, from the input to the output, and write them.

    `batches` are model inputs; `only` are names out of `writable`, by default all. Each pass over the batches collects
    H of as many operators as fit into `MEMORY` and sees the rounded weights of earlier passes. Fewer `bits` keep to
    every 2^(8 - bits)-th code, as a stress test. An operator that the samples do not reach, or with values that are not
    finite, is not in the result.
    """
    chosen = {name: leaf for name, leaf in writable(prepared)[0].items() if only is None or name in only}
    found: dict[str, Rounded] = {}
    for group in in_memory(chosen):
        part = {name: chosen[name] for name in group}
        for name, moments in input_moments(prepared, part, batches).items():
            leaf = part[name]
            rounded = _rounded(leaf, grid_of(leaf, prepared.weights[name], bits), moments)
            if rounded is not None:
                found[name] = rounded
                write(prepared, name, leaf, rounded.weight)
    return found


@torch.no_grad()
def write(prepared: QuantizedModel, name: str, leaf: WeightedLeaf, weight: Tensor) -> None:
    """Write a weight, and make it the one that its scale was set for."""
    leaf.weight.copy_(weight)
    prepared.weights[name].forget_weight()


def second_moments(columns: Tensor) -> Tensor:
    """X X^T of each group."""
    return columns @ columns.transpose(1, 2)


@torch.no_grad()
def input_moments(
    prepared: QuantizedModel,
    chosen: Mapping[str, WeightedLeaf],
    batches: Sequence[Any],
    of: Callable[[Tensor], Tensor] = second_moments,
) -> dict[str, Tensor]:
    """Sums of `of`(X), by default H = X X^T, [groups, inputs, inputs], in one pass over the quantized model.

    X are the columns of an operator, [groups, inputs, columns], in parts.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def visit(name: str, run: Run, weight: Tensor, bias: Tensor | None, input: Tensor) -> Tensor:
        leaf = chosen[name]
        for part in _parts(leaf, input):
            moments = of(columns(leaf, part, generator).float())
            if name in found:
                found[name] += moments
            else:
                found[name] = moments
        return run(weight, bias, input)

    with visiting(chosen, visit), prepared.quantized():
        for inputs in batches:
            call_model(prepared, inputs)
    return found


def _parts(leaf: WeightedLeaf, input: Tensor) -> Iterator[Tensor]:
    """The samples of an input in parts, so that few columns are held at a time."""
    if input.ndim < 2 or input.ndim < leaf.weight.ndim:
        return iter([input])
    groups, _, inputs = as_rows(leaf, leaf.weight).shape
    a_sample = groups * inputs * (1 if input.ndim == 2 else POSITIONS)
    return iter(torch.split(input, max(1, CHUNK // a_sample)))


def grid_of(leaf: WeightedLeaf, quantizer: FakeQuant, bits: int = 8) -> Grid:
    """The present weight of a calibrated leaf, batch norm folded in, with its scale and codes."""
    folded = leaf.folded()[0].detach().double()
    size = folded.abs()
    others = [d for d in range(folded.ndim) if quantizer.scale.shape[d] == 1]
    held = size == size.amax(dim=others, keepdim=True)
    scale = quantizer.scale.double().expand_as(folded)
    weight, steps, kept = (as_rows(leaf, t) for t in (folded, scale, held))
    return Grid(weight, steps, kept, lowest=-int(quantizer.divisor()), stride=2 ** (8 - bits))


def _rounded(leaf: WeightedLeaf, grid: Grid, moments: Tensor) -> Rounded | None:
    """The weight with new codes; None if the inputs were not finite."""
    if not bool(torch.isfinite(moments).all()):
        return None
    hessian = moments.double()
    damped = hessian.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += DAMPING * diagonal.mean(1, keepdim=True)
    diagonal[diagonal == 0] = 1.0  # all inputs of the group are zero on all samples
    nearest, codes = grid.nearest(grid.weight), second_order(grid, damped)
    better = grid.errors(codes, damped) < grid.errors(nearest, damped)
    codes = torch.where(better[..., None], codes, nearest)
    size = float(squared(grid.weight, hessian).sum()) or 1.0
    before, after = ((float(grid.errors(c, hessian).sum()) / size) ** 0.5 for c in (nearest, codes))
    return Rounded(stored(leaf, grid, codes), before, after, float((codes != nearest).double().mean()))


def stored(leaf: WeightedLeaf, grid: Grid, codes: Tensor) -> Tensor:
    """The float weight with these codes, before the batch norm is folded in."""
    own, folded, keep = leaf.weight.detach(), from_rows(leaf, codes * grid.scale), from_rows(leaf, grid.held)
    if leaf.qflow_norm is not None:
        factor = leaf.along_output(leaf.factor().double()).expand_as(folded)
        keep = keep | (factor.abs() < DEAD)  # the norm has switched the channel off
        folded = folded / torch.where(keep, torch.ones_like(factor), factor)
    return torch.where(keep, own, folded.to(own))
