"""Where the samples of a captured batch lie in each value, found operator by operator.

Convolutions, linear layers, folded batch norms and sums keep the samples of a batch apart by definition. Any other
operator is run on each half of what it read and has to give the halves of what it gave (where the batch is odd, or
variants will lie one behind the other: on other data, and on both by turns as often as there will be variants). One
that mixes samples, or holds the batch size in its call, does not. An index in the code beyond the batch that is
looked at (`x[100:] = 0`) is not seen. The axis may be another than the first, and hold samples folded with something
else, [B * heads, ...].
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
from qflow.quant.replay.captured_ops import Floats, Ops, Values
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.tape import Op, Ref, references, tensors_in

TOLERANCE = 1e-3
"""Relative norm within which the values of two batches equal those of both together: kernels differ with the size."""

_REARRANGES = frozenset([OpKind.move, OpKind.concat])
"""What mixes samples only until another such op puts them back: [B, L] as [L, B], two batches as one."""
_UNCHECKED = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu"])
"""Functions that read beyond their states, without a word, where those are of another batch size than the input."""

Axes = dict[int, tuple[int, ...]]
"""Op -> for each of its tensors the axis that holds the samples."""


class MixesSamples(ReplayError):
    """An op that computes something else of a sample in company than alone."""


def as_captured(op: Op, count: int) -> tuple[Any, Any]:
    """(args, kwargs) of the op whatever the number of batches."""
    assert op.call is not None
    return op.call.args, op.call.kwargs


def axes_by_running(
    ops: Ops, captured: Captured, size: int, wide: int = 0, calls: Callable[[Op, int], Any] = as_captured
) -> Axes:
    """Axes of all live values of a batch of `size`, proven for `wide` such batches in a row if that is asked for.

    `calls` gives the arguments for so many batches. Raises MixesSamples, ReplayError, or what an op raises at another
    batch size.
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
        apart = wide or 2 * (size % 2)
        axes[op.index] = _by_running(ops, op, floats, axes, size, apart, calls) if axis is None else (axis,)
    return axes


def _by_definition(ops: Ops, op: Op, axes: Axes) -> int | None:
    """The axis where the kind of operator says it; None where it has to be seen."""
    assert op.call is not None
    read = references((op.call.args, op.call.kwargs))
    leaf = ops.leaves.get(op.module or "")
    identity = isinstance(ops.modules.get(op.module or ""), nn.Identity) and op.kind != OpKind.skipped
    if op.module in ops.folded or identity:
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


def _by_running(
    ops: Ops, op: Op, floats: Floats, axes: Axes, size: int, wide: int, calls: Callable[[Op, int], Any]
) -> tuple[int, ...]:
    """Axes of what the op gives: on the halves of the batch, or on `wide` batches, this one and another in turn."""
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
        return torch.cat([(value, other(ref))[_turn(n)] for n in range(wide)], axis)

    def run(value: Callable[[Ref], Tensor], count: int = 1) -> Values:
        return ops.run(op, *ops.arguments(calls(op, count), value))

    if wide:
        return sample_axes(op, floats.get(op.index), run(other), run(joined, wide), wide)
    first, second = (run(functools.partial(half, which=n)) for n in (0, 1))
    return sample_axes(op, first, second, floats.get(op.index), 2)


def sample_axes(op: Op, first: Values, second: Values, whole: Values, parts: int) -> tuple[int, ...]:
    """Axis along which each tensor of `whole` is `parts` such ones, `first` and `second` by turns.

    Raises ReplayError without one or where a rearrangement gives others, MixesSamples where another op does.
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
    """Which of two the n-th is: 0 1 1 0 1 0 0 1 ... (Thue, Morse) is no shift of itself, as 0 1 0 1 would be."""
    return bin(n).count("1") % 2


def grown(single: Sequence[int], whole: Sequence[int], parts: int) -> int | None:
    """The one dim that is `parts` times as large; None if no shape is the other with one dim so many times as large."""
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
    if not math.isfinite(gap + size):  # masks: infinite, or too large to be squared
        a, b = part.double().nan_to_num(), found.double().nan_to_num()
        gap, size = float((a - b).norm()), float(a.norm())
    return gap <= TOLERANCE * size
