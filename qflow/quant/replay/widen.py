"""Widths: how the captured calls for B samples change if n batches are stacked along the batch axis.

A replay can run several variants of the same samples at once, stacked along the batch axis. The place of that axis in
each value (it may be merged with another, [B * heads, ...]) is found operator by operator (samples.py). A call without
a batch size in it runs at any batch size. For a call that holds one (`view(B, -1)`), captures of two batches and of
both together show what its integers have to be. It is not assumed that the samples of one variant stay together (a
transposed axis merged into rows would mix them): each operator is tested at the full number of stacked batches, on this
batch and other data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, ReplayError, capture
from qflow.quant.replay.captured_ops import Ops
from qflow.quant.replay.samples import axes_by_running, grown, sample_axes
from qflow.quant.trace.calling import cut
from qflow.quant.trace.tape import Op, Ref


@dataclass
class Widths:
    """Up to `most[op]` variants run at once if the first of them starts at this op.

    `axes[op]` is the axis of the samples in each result of the op. `rows[op]` is the number of samples, over all
    variants together, for which this op and those behind it were tested to keep samples apart.
    """

    most: list[int]
    rows: list[int]
    axes: dict[int, tuple[int, ...]]
    path: list[tuple[str, int]]
    """Names and ranks of the ops: on another path through the model, the same index is another op."""
    scaled: dict[int, dict[int, int | None]]
    """Op -> leaf of its (args, kwargs) that grows with the batch -> None for an integer, the axis for a tensor."""
    calls: dict[tuple[int, int], Any] = field(default_factory=dict)

    def at(self, captured: Captured, size: int, most: Sequence[int]) -> Widths | None:
        """The same for another batch of `size`, up to `most[op]` variants and as many rows as were tested.

        None if only one variant fits, or if the batch takes another path through the model.
        """
        if path_of(captured) != self.path:
            return None
        fitting = [max(1, min(n, rows // size)) for n, rows in zip(most, self.rows, strict=True)]
        return Widths(fitting, self.rows, self.axes, self.path, self.scaled) if max(fitting) > 1 else None

    def call(self, op: Op, count: int) -> Any:
        """(args, kwargs) of the op, with `Ref`s, for `count` stacked batches."""
        assert op.call is not None
        if op.index not in self.scaled:
            return op.call.args, op.call.kwargs
        key = (op.index, count)
        if key not in self.calls:
            leaves, spec = tree_flatten((op.call.args, op.call.kwargs))
            for i, axis in self.scaled[op.index].items():
                leaves[i] = leaves[i] * count if axis is None else torch.cat([leaves[i]] * count, axis)
            self.calls[key] = tree_unflatten(leaves, spec)
        return self.calls[key]


def most_behind(captured: Captured, most: int, room: float) -> list[int]:
    """For each op, how many variants (at most `most`) may run at once if none of them starts before it.

    An average value of that op and of those behind it, of all variants together, takes at most `room` bytes.
    """
    behind: list[int] = []
    held, count = 0, 0
    for op in reversed(captured.tape.ops):
        values = captured.values.get(op.index, ())
        held += sum(t.numel() * t.element_size() for t in values)
        count += bool(values)
        behind.append(max(1, int(min(most, room * count / held))) if held else most)
    return behind[::-1]


def widen(
    model: nn.Module,
    prepared: QuantizedModel,
    ops: Ops,
    inputs: Any,
    captured: Captured,
    size: int,
    most: int,
    room: float = math.inf,
) -> Widths:
    """Widths of a captured batch of `size` samples, for up to `most` variants. Raises ReplayError with the reason.

    `ops` are those of `captured`. `room` is that of `most_behind`.
    """
    fitting = most_behind(captured, most, room)
    tested = list(itertools.accumulate(fitting, max))  # a group that starts before an op runs it too
    rows = [size * n for n in tested]
    try:
        return Widths(fitting, rows, axes_by_running(ops, captured, size, tested), path_of(captured), {})
    except Exception:  # an operator may raise anything at another batch size: captures may show what it needs there
        pass
    try:
        widths = _by_capture(model, prepared, ops, inputs, captured, size)
        widths.most, widths.rows = fitting, rows
        widths.axes = axes_by_running(ops, captured, size, tested, widths.call)
    except ReplayError:
        raise
    except Exception as error:
        raise ReplayError(f"batches of other sizes do not run: {' '.join(str(error).split())}") from error
    return widths


def _by_capture(
    model: nn.Module, prepared: QuantizedModel, ops: Ops, inputs: Any, captured: Captured, size: int
) -> Widths:
    """Widths from captures of both halves, or of other data and both together."""
    if size % 2 == 0:
        parts = [cut(inputs, size, 0, size // 2), cut(inputs, size, size // 2, size)]
        first, second = (capture(model, prepared.plan, part, torch.inf) for part in parts)
        together = captured
    else:
        parts = [tree_map(lambda t: _other(t, size), inputs), tree_map(lambda t: _joined(t, size), inputs)]
        second, together = (capture(model, prepared.plan, part, torch.inf) for part in parts)
        first = captured
    names = [[op.name for op in found.tape.ops] for found in (first, second, together)]
    if names[0] != names[1] or names[0] != names[2]:
        raise ReplayError("the model takes another path at another batch size or on other data")
    widths = Widths([], [], {}, path_of(captured), {})
    for live in ops.ops:  # no output depends on the others, such as a test of a mask
        op, twice = first.tape.ops[live.index], together.tape.ops[live.index]
        values = [found.values.get(op.index) for found in (first, second, together)]
        axis = grown(op.shape, twice.shape, 2)
        if all(v is not None for v in values):
            widths.axes[op.index] = sample_axes(op, values[0], values[1], values[2], 2)  # type: ignore[arg-type]
        elif axis is not None:  # inside a fused group: only the result of the group is compared
            widths.axes[op.index] = (axis,)
        if op.call is not None and twice.call is not None:
            scaled = _scaled(op, twice)
            if scaled:
                widths.scaled[op.index] = scaled
    return widths


def path_of(captured: Captured) -> list[tuple[str, int]]:
    """Name and rank of every op: two batches with equal lists take the same path through the model."""
    return [(op.name, len(op.shape)) for op in captured.tape.ops]


def first_axes(
    model: nn.Module, prepared: QuantizedModel, ops: Ops, inputs: Any, captured: Captured, size: int
) -> dict[int, int | None]:
    """Op -> axis of its first result that holds the samples; None if there is none.

    Each sample takes (axis length / `size`) entries of that axis, which may be merged with another, [B * heads, ...].
    If calls hold the batch size, or an op mixes samples, the axis follows from the shapes in a capture of one sample.
    """
    if size == 1:
        return {}
    try:
        return {index: axes[0] for index, axes in axes_by_running(ops, captured, size).items()}
    except Exception:  # an operator may raise anything at another batch size
        return _by_one_sample(model, prepared, inputs, captured, size)


def _by_one_sample(
    model: nn.Module, prepared: QuantizedModel, inputs: Any, captured: Captured, size: int
) -> dict[int, int | None]:
    one = capture(model, prepared.plan, cut(inputs, size, 0, 1), torch.inf)
    if [op.name for op in one.tape.ops] != [op.name for op in captured.tape.ops]:
        return {}
    found: dict[int, int | None] = {}
    for op, single in zip(captured.tape.ops, one.tape.ops, strict=True):
        pairs = list(enumerate(zip(single.shape, op.shape, strict=False)))
        differ = [d for d, (a, b) in pairs if a != b]
        fits = len(single.shape) == len(op.shape) and len(differ) == 1
        found[op.index] = differ[0] if fits and op.shape[differ[0]] == size * single.shape[differ[0]] else None
    return found


def _other(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != size:
        return value
    return value * 0.75 if value.is_floating_point() else value


def _joined(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != size:
        return value
    return torch.cat([value, _other(value, size)])


def _scaled(op: Op, twice: Op) -> dict[int, int | None]:
    assert op.call is not None
    assert twice.call is not None
    found: dict[int, int | None] = {}
    leaves = tree_flatten((op.call.args, op.call.kwargs))[0]
    others = tree_flatten((twice.call.args, twice.call.kwargs))[0]
    if len(leaves) != len(others):
        raise ReplayError(f"{op.name} is called otherwise at twice the batch size")
    for i, (a, c) in enumerate(zip(leaves, others, strict=True)):
        if isinstance(a, Ref) or a is c:
            continue
        if isinstance(a, Tensor) and isinstance(c, Tensor):
            axis = None if a.shape == c.shape else grown(a.shape, c.shape, 2)
            wanted = a if axis is None else torch.cat([a, a], axis)
            if wanted.shape != c.shape or not torch.equal(wanted, c):
                raise ReplayError(f"{op.name} reads a constant that depends on the batch size")
            if axis is not None:
                found[i] = axis
        elif isinstance(a, int) and not isinstance(a, bool) and a != c:
            if c != 2 * a:
                raise ReplayError(f"{op.name} is called with {a} and at twice the batch size with {c}")
            found[i] = None
        elif a != c and not (isinstance(a, slice) and isinstance(c, slice)):
            raise ReplayError(f"{op.name} is called with {a} and at twice the batch size with {c}")
        elif a != c:
            raise ReplayError(f"{op.name} cuts along the batch")
    return found
