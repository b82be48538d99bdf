"""Find, operator by operator, the axis of each value of a captured batch that holds the samples.

Convolutions, linear layers, folded batch norms and sums keep the samples of a batch apart by definition. Any other
operator is run on each half of its inputs and has to give the halves of its result. For an odd batch, or if variants
will be stacked, it is instead run on other data, and on a stack of both batches with as many entries as there will be
variants; the result has to be the stack of both results. An operator that mixes samples, or whose call holds the batch
size, fails this test. A fixed index beyond the tested batch (`x[100:] = 0`) is not noticed. The axis need not be the
first, and may hold the samples merged with another dimension, [B * heads, ...].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.graph import OpKind
from qflow.quant.model.weighted import LinearLeaf, WeightedLeaf
from qflow.quant.replay.capture import Captured, ReplayError
from qflow.quant.replay.captured_ops import Ops, Values
from qflow.quant.replay.floats import Floats
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.tape import Op, Ref, references, tensors_in

TOLERANCE = 1e-3
"""Relative norm by which two batches and both together may differ: kernels differ with the size."""

_REARRANGES = frozenset([OpKind.move, OpKind.concat])
"""Kinds that may rearrange samples until another such op restores them: [B, L] as [L, B], two batches as one."""
_UNCHECKED = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu"])
"""Functions that silently read out of bounds if their states have another batch size than the input."""

Axes = dict[int, tuple[int, ...]]
"""Op -> for each of its results, the axis that holds the samples."""


class MixesSamples(ReplayError):
    """The result of an op for one sample depends on the other samples of the batch."""


def as_captured(op: Op, count: int) -> tuple[Any, Any]:
    """(args, kwargs) of the op as captured, for any number of batches."""
    assert op.call is not None
    return op.call.args, op.call.kwargs


def axes_by_running(
    ops: Ops, captured: Captured, size: int, repeats: Sequence[int] = (), calls: Callable[[Op, int], Any] = as_captured
) -> Axes:
    """Axes of all captured values of a batch of `size`; with `repeats`, tested for so many stacked batches at each op.

    `calls(op, n)` gives the arguments of an op for n batches. Raises MixesSamples or ReplayError; an op may also raise
    something else at another batch size.
    """
    floats, axes = Floats(ops, captured), Axes()
    for op in ops.ops:
        if op.call is None:
            given = captured.inputs[op.index]
            if not given.ndim or given.shape[0] != size:
                raise ReplayError(f"{op.name} does not grow with the batch")
            axes[op.index] = (0,)
            continue
        axis = _by_definition(ops, op, axes)
        stacked = max(2, repeats[op.index]) if repeats else 2 * (size % 2)
        axes[op.index] = _by_running(ops, op, floats, axes, size, stacked, calls) if axis is None else (axis,)
    return axes


def _by_definition(ops: Ops, op: Op, axes: Axes) -> int | None:
    """The axis, if it follows from the kind of operator; None if the operator has to be run."""
    assert op.call is not None
    read = references((op.call.args, op.call.kwargs))
    leaf = ops.leaves.get(op.module or "")
    identity = isinstance(ops.modules.get(op.module or ""), nn.Identity) and op.kind != OpKind.skipped
    if op.owner in ops.folded or identity:
        return axes[read[0].op][read[0].position]
    if isinstance(leaf, WeightedLeaf) and op.kind != OpKind.skipped and len(read) == 1:
        axis, ndim = axes[read[0].op][read[0].position], len(op.shape)
        apart = axis < ndim - 1 if isinstance(leaf, LinearLeaf) else axis == 0 and ndim == leaf.weight.ndim
        return axis if apart else None
    return _pointwise(ops, op, read, axes) if op.kind in (OpKind.relu, OpKind.add) and op.single else None


def _pointwise(ops: Ops, op: Op, read: Sequence[Ref], axes: Axes) -> int | None:
    """The axis of an element-wise operator; None if an operand is broadcast along it or has it in another place."""
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


def _by_running(
    ops: Ops, op: Op, floats: Floats, axes: Axes, size: int, repeats: int, calls: Callable[[Op, int], Any]
) -> tuple[int, ...]:
    """Axes of the op's results, from the halves of the batch, or from `repeats` batches of this data and other data."""
    assert op.call is not None
    function = op.call.function
    if calls is as_captured and function is not None and function_name(function) in _UNCHECKED:
        raise ReplayError(f"{op.name} has states for a batch of {size}")

    def at(ref: Ref) -> tuple[Tensor, int]:
        return floats.get(ref.op)[ref.position], axes[ref.op][ref.position]

    def half(ref: Ref, which: int) -> Tensor:
        value, axis = at(ref)
        length = value.shape[axis] // 2
        return value.narrow(axis, which * length, length)

    def other(ref: Ref) -> Tensor:
        value, _ = at(ref)
        return value * 0.75 if value.is_floating_point() or value.is_complex() else value

    def joined(ref: Ref) -> Tensor:
        value, axis = at(ref)
        return torch.cat([(value, other(ref))[_turn(n)] for n in range(repeats)], axis)

    def run(value: Callable[[Ref], Tensor], count: int = 1) -> Values:
        return ops.run(op, *ops.arguments(calls(op, count), value))

    if repeats:
        return sample_axes(op, floats.get(op.index), run(other), run(joined, repeats), repeats)
    first, second = (run(functools.partial(half, which=n)) for n in (0, 1))
    return sample_axes(op, first, second, floats.get(op.index), 2)


def sample_axes(op: Op, first: Values, second: Values, whole: Values, parts: int) -> tuple[int, ...]:
    """For each tensor of `whole`, the axis along which it is a stack of `parts` tensors from `first` and `second`.

    The order of the two is that of `_turn`. Raises ReplayError if there is no such axis or if a rearranging op gives
    other values, MixesSamples if any other op does.
    """
    found = []
    for a, b, c in zip(first, second, whole, strict=True):
        axis = grown(a.shape, c.shape, parts)
        if axis is None or a.shape != b.shape:
            raise ReplayError(f"{op.name} does not grow with the batch")
        length = a.shape[axis]
        if not all(_close((a, b)[_turn(n)], c.narrow(axis, n * length, length)) for n in range(parts)):
            kind = ReplayError if op.kind in _REARRANGES else MixesSamples
            raise kind(f"{op.name} mixes the samples of a batch")
        found.append(axis)
    return tuple(found)


def _turn(n: int) -> int:
    """Which of the two batches is the n-th: 0 1 1 0 1 0 0 1 ... (Thue-Morse) is no shift of itself, unlike 0 1 0 1."""
    return bin(n).count("1") % 2


def grown(single: Sequence[int], whole: Sequence[int], parts: int) -> int | None:
    """The one dim of `whole` that is `parts` times as large as in `single`; None if the shapes differ otherwise."""
    if len(single) != len(whole):
        return None
    differ = [d for d, (a, c) in enumerate(zip(single, whole, strict=True)) if a != c]
    return differ[0] if len(differ) == 1 and whole[differ[0]] == parts * single[differ[0]] else None


def _close(part: Tensor, found: Tensor) -> bool:
    if part.is_complex():
        part, found = (torch.view_as_real(t.resolve_conj()) for t in (part, found))
    if not part.is_floating_point():
        return bool(torch.equal(part, found))
    gap, size = float((part - found).norm()), float(part.norm())
    if not math.isfinite(gap + size):  # values of a mask: infinite, or too large to be squared
        a, b = part.double().nan_to_num(), found.double().nan_to_num()
        gap, size = float((a - b).norm()), float(a.norm())
    return gap <= TOLERANCE * size
