"""Where the samples of a captured batch lie in each value, found operator by operator.

Convolutions, linear layers, folded batch norms and sums keep the samples of a batch apart by definition. Any other
operator is run on each half of what it read (where the batch is odd: on other data, and on both joined) and has to
give the halves of what it gave: one that mixes samples, or holds the batch size in its call, does not. The axis may
be another than the first, and hold samples folded with something else, [B * heads, ...].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qflow.core.graph import OpKind
from qflow.quant.capture import Captured, ReplayError
from qflow.quant.rerun import Floats, Ops, Values
from qflow.quant.tape import Op, Ref, references, tensors_in
from qflow.quant.weighted import LinearLeaf, WeightedLeaf

TOLERANCE = 1e-3
"""Relative norm within which the values of two batches equal those of both together: kernels differ with the size."""

Axes = dict[int, tuple[int, ...]]
"""Op -> for each of its tensors the axis that holds the samples."""


def axes_by_running(ops: Ops, captured: Captured, size: int) -> Axes:
    """Axes of all live values of a batch of `size`. Raises ReplayError, or what an op raises at another batch size."""
    floats, axes = Floats(ops, captured), Axes()
    for op in ops.ops:
        if op.call is None:
            given = captured.inputs[op.index]
            if not given.ndim or given.shape[0] != size:
                raise ReplayError(f"{op.name} does not grow with the batch")
            axes[op.index] = (0,)
            continue
        axis = _by_definition(ops, op, axes)
        axes[op.index] = _by_running(ops, op, floats, axes, size) if axis is None else (axis,)
    return axes


def _by_definition(ops: Ops, op: Op, axes: Axes) -> int | None:
    """The axis where the kind of operator says it; None where it has to be seen."""
    assert op.call is not None
    read = references((op.call.args, op.call.kwargs))
    leaf = ops.leaves.get(op.module or "")
    if op.module in ops.folded:
        return axes[read[0].op][read[0].position]
    if isinstance(leaf, WeightedLeaf) and op.kind != OpKind.skipped and len(read) == 1:
        axis, ndim = axes[read[0].op][read[0].position], len(op.shape)
        apart = axis < ndim - 1 if isinstance(leaf, LinearLeaf) else axis == 0 and ndim == leaf.weight.ndim
        return axis if apart else None
    return _pointwise(ops, op, read, axes) if op.kind in (OpKind.relu, OpKind.add) and op.single else None


def _pointwise(ops: Ops, op: Op, read: Sequence[Ref], axes: Axes) -> int | None:
    """The axis of an operator that works on each value alone; None where an operand has it broadcast, or elsewhere."""
    assert op.call is not None
    if not read or any(ref.position for ref in read):
        return None
    shapes = [(ops.tape.ops[ref.op].shape, axes[ref.op][0]) for ref in read]
    ends = {len(shape) - axis for shape, axis in shapes}
    end = max(ends)
    axis = len(op.shape) - end
    sizes = {shape[at] for shape, at in shapes} | ({op.shape[axis]} if axis >= 0 else {-1})
    constants = tensors_in((op.call.args, op.call.kwargs))
    held = any(t.ndim >= end and t.shape[t.ndim - end] > 1 for t in constants)
    return axis if len(ends) == len(sizes) == 1 and not held else None


def _by_running(ops: Ops, op: Op, floats: Floats, axes: Axes, size: int) -> tuple[int, ...]:
    assert op.call is not None
    call = (op.call.args, op.call.kwargs)

    def at(ref: Ref) -> tuple[Tensor, int]:
        return floats.get(ref.op)[ref.position], axes[ref.op][ref.position]

    def half(ref: Ref, which: int) -> Tensor:
        value, axis = at(ref)
        length = value.shape[axis] // 2
        return value.narrow(axis, which * length, length)

    def other(ref: Ref) -> Tensor:
        value, _ = at(ref)
        return value * 0.75 if value.is_floating_point() else value

    def joined(ref: Ref) -> Tensor:
        value, axis = at(ref)
        return torch.cat([value, other(ref)], axis)

    if size % 2 == 0:
        first, second = (ops.run(op, *ops.arguments(call, lambda r, n=n: half(r, n))) for n in (0, 1))  # type: ignore[misc]
        wide = floats.get(op.index)
    else:
        first = floats.get(op.index)
        second, wide = (ops.run(op, *ops.arguments(call, value)) for value in (other, joined))
    return doubled_axes(op, first, second, wide)


def doubled_axes(op: Op, first: Values, second: Values, wide: Values) -> tuple[int, ...]:
    """Axis of each tensor of `wide` that holds two batches one behind the other. Raises ReplayError without one."""
    found = []
    for a, b, c in zip(first, second, wide, strict=True):
        axis = doubled(a.shape, c.shape)
        if axis is None or a.shape != b.shape:
            raise ReplayError(f"{op.name} does not grow with the batch")
        half = a.shape[axis]
        if not all(_close(part, c.narrow(axis, begin, half)) for part, begin in ((a, 0), (b, half))):
            raise ReplayError(f"{op.name} mixes the samples of a batch")
        found.append(axis)
    return tuple(found)


def doubled(single: Sequence[int], wide: Sequence[int]) -> int | None:
    """The one dim whose size doubles; None if no shape is the other with one dim doubled."""
    if len(single) != len(wide):
        return None
    differ = [d for d, (a, c) in enumerate(zip(single, wide, strict=True)) if a != c]
    return differ[0] if len(differ) == 1 and wide[differ[0]] == 2 * single[differ[0]] else None


def _close(part: Tensor, found: Tensor) -> bool:
    if not part.is_floating_point():
        return bool(torch.equal(part, found))
    gap, size = float((part - found).norm()), float(part.norm())
    if not math.isfinite(gap + size):  # masks: infinite, or too large to be squared
        a, b = part.double().nan_to_num(), found.double().nan_to_num()
        gap, size = float((a - b).norm()), float(a.norm())
    return gap <= TOLERANCE * size
