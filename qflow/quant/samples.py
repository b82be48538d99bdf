"""Where the samples of a captured batch lie in each value, found operator by operator.

Convolutions, linear layers, folded batch norms and sums keep the samples of a batch apart by definition. Any other
operator is run on what it read of the first sample, and of the second, and has to give what it gave for them in
company (where there is one sample: the same with other data behind it). One that mixes samples, or holds the batch
size in its call, does not. The axis may be another than the first, and hold samples folded with something else,
[B * heads, ...].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

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

    def sample(ref: Ref, which: int) -> Tensor:
        value, axis = at(ref)
        length = value.shape[axis] // size
        return value.narrow(axis, which * length, length)

    def other(ref: Ref) -> Tensor:
        value, _ = at(ref)
        return value * 0.75 if value.is_floating_point() else value

    def joined(ref: Ref) -> Tensor:
        value, axis = at(ref)
        return torch.cat([value, other(ref)], axis)

    def run(value: Callable[[Ref], Tensor]) -> Values:
        return ops.run(op, *ops.arguments(call, value))

    if size == 1:
        return sample_axes(op, floats.get(op.index), run(other), run(joined), 2)
    first, second = (run(functools.partial(sample, which=n)) for n in (0, 1))
    return sample_axes(op, first, second, floats.get(op.index), size)


def sample_axes(op: Op, first: Values, second: Values, whole: Values, parts: int) -> tuple[int, ...]:
    """Axis along which each tensor of `whole` is `parts` such ones, these two first. Raises ReplayError without one."""
    found = []
    for a, b, c in zip(first, second, whole, strict=True):
        axis = grown(a.shape, c.shape, parts)
        if axis is None or a.shape != b.shape:
            raise ReplayError(f"{op.name} does not grow with the batch")
        length = a.shape[axis]
        if not all(_close(part, c.narrow(axis, begin, length)) for part, begin in ((a, 0), (b, length))):
            raise ReplayError(f"{op.name} mixes the samples of a batch")
        found.append(axis)
    return tuple(found)


def grown(single: Sequence[int], whole: Sequence[int], parts: int) -> int | None:
    """The one dim that is `parts` times as large; None if no shape is the other with one dim so many times as large."""
    if len(single) != len(whole):
        return None
    differ = [d for d, (a, c) in enumerate(zip(single, whole, strict=True)) if a != c]
    return differ[0] if len(differ) == 1 and whole[differ[0]] == parts * single[differ[0]] else None


def _close(part: Tensor, found: Tensor) -> bool:
    if not part.is_floating_point():
        return bool(torch.equal(part, found))
    gap, size = float((part - found).norm()), float(part.norm())
    if not math.isfinite(gap + size):  # masks: infinite, or too large to be squared
        a, b = part.double().nan_to_num(), found.double().nan_to_num()
        gap, size = float((a - b).norm()), float(a.norm())
    return gap <= TOLERANCE * size
