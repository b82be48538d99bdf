"""Widths: how the calls of a captured batch of B samples change when it becomes n batches in a row.

A wide pass runs several variants of the same samples at once, one behind the other along the batch axis. Where that
axis lies in each value (it may be folded into another, [B * heads, ...]) and which integers of a call hold it
(`view(B, -1)`) is read off two runs, of B and of 2 B samples. That the samples of one variant then stay together
everywhere (a transposed axis merged into rows would mix them) is not assumed: the second half is other data, and
every value of the wide run must hold those of both separate ones in turn.

Calls that hold no batch size run on any, so the captured ones are simply run again, at half the cost of a capture;
where one fails or gives something else, captures tell what its integers have to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from qflow.quant.calling import cut
from qflow.quant.capture import Captured, ReplayError, capture
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.rerun import Floats, Ops, Values
from qflow.quant.tape import Op, Ref

TOLERANCE = 1e-3
"""Relative norm within which a wide batch's values equal the separate ones: kernels differ with the batch size."""


@dataclass
class Widths:
    """`most` variants at once; `axes[op]` says for each of its tensors where the samples lie."""

    most: int
    axes: dict[int, tuple[int, ...]]
    path: list[tuple[str, int]]
    """Names and ranks of the ops: on another path indices mean other ops."""
    scaled: dict[int, dict[int, int | None]]
    """Op -> which leaves of its call grow with the batch: integers (None), or tensors along an axis."""
    outputs: dict[str, Tensor] | None = None
    """Float outputs of the captured batch, if its ops were run again to find out."""
    calls: dict[tuple[int, int], Any] = field(default_factory=dict)

    def at(self, captured: Captured, most: int) -> Widths | None:
        """The same for another batch, up to `most` variants; None where that takes another path through the code."""
        return Widths(most, self.axes, self.path, self.scaled) if path_of(captured) == self.path else None

    def call(self, op: Op, count: int) -> Any:
        """(args, kwargs) of the op, with `Ref`s, for `count` batches in a row."""
        key = (op.index, count)
        if key not in self.calls:
            assert op.call is not None
            leaves, spec = tree_flatten((op.call.args, op.call.kwargs))
            for i, axis in self.scaled.get(op.index, {}).items():
                leaves[i] = leaves[i] * count if axis is None else torch.cat([leaves[i]] * count, axis)
            self.calls[key] = tree_unflatten(leaves, spec)
        return self.calls[key]


def widen(
    model: nn.Module, prepared: QuantizedModel, ops: Ops, inputs: Any, captured: Captured, size: int, most: int
) -> Widths:
    """Widths of a captured batch of `size` samples, for up to `most` variants. Raises ReplayError with the reason.

    An even batch is the wide one of its two halves; otherwise the batch is joined with other data. `ops` are those of
    `captured`.
    """
    try:
        return _by_running(ops, captured, size, most)
    except Exception:  # whatever an operator raises at another batch size; a reason comes from the captures
        return _by_capture(model, prepared, inputs, captured, size, most)


def _by_running(ops: Ops, captured: Captured, size: int, most: int) -> Widths:
    """Widths where every call runs as it is at another batch size."""
    given = captured.inputs
    if size % 2 == 0:
        parts = [cut(given, size, 0, size // 2), cut(given, size, size // 2, size)]
        first, second = (_values(ops, part) for part in parts)
        wide = captured.values
    else:
        first = captured.values
        second = _values(ops, tree_map(lambda t: _other(t, size), given))
        wide = _values(ops, tree_map(lambda t: _joined(t, size), given))
    widths = Widths(most, {}, path_of(captured), {})
    for op in ops.ops:
        values = [found.get(op.index) for found in (first, second, wide)]
        a, c = (op.shape if v is None else tuple(v[0].shape) for v in (values[0], values[2]))
        axis = _doubled(a, c)
        if all(v is not None for v in values):
            widths.axes[op.index] = tuple(_axis(op, *v) for v in zip(*values, strict=True))  # type: ignore[arg-type]
        elif axis is not None:
            widths.axes[op.index] = (axis,)
    widths.outputs = {}
    for name, ref in captured.outputs:
        own, axis = [found[ref.op][ref.position] for found in (first, second, wide)], widths.axes[ref.op][ref.position]
        half = own[0].shape[axis]
        widths.outputs[name] = torch.cat(own[:2], axis) if size % 2 == 0 else own[2].narrow(axis, 0, half)
    return widths


def _values(ops: Ops, given: dict[int, Tensor]) -> dict[int, Values]:
    """Every live op's result on other inputs."""
    floats = Floats(ops, Captured(ops.tape, ops.outputs, given, {}, True))
    return {op.index: floats.get(op.index) for op in ops.ops}


def _by_capture(
    model: nn.Module, prepared: QuantizedModel, inputs: Any, captured: Captured, size: int, most: int
) -> Widths:
    """Widths from captures of both halves, or of other data and both together."""
    if size % 2 == 0:
        parts = [cut(inputs, size, 0, size // 2), cut(inputs, size, size // 2, size)]
        first, second = (capture(model, prepared.plan, part, torch.inf) for part in parts)
        wide = captured
    else:
        parts = [tree_map(lambda t: _other(t, size), inputs), tree_map(lambda t: _joined(t, size), inputs)]
        second, wide = (capture(model, prepared.plan, part, torch.inf) for part in parts)
        first = captured
    names = [[op.name for op in found.tape.ops] for found in (first, second, wide)]
    if names[0] != names[1] or names[0] != names[2]:
        raise ReplayError("the model takes another path at another batch size or on other data")
    widths = Widths(most, {}, path_of(captured), {})
    for op, twice in zip(first.tape.ops, wide.tape.ops, strict=True):
        values = [found.values.get(op.index) for found in (first, second, wide)]
        axis = _doubled(op.shape, twice.shape)
        if all(v is not None for v in values):
            widths.axes[op.index] = tuple(_axis(op, a, b, c) for a, b, c in zip(*values, strict=True))  # type: ignore[arg-type]
        elif axis is not None:  # inside a fused group: what leaves the group is compared
            widths.axes[op.index] = (axis,)
        if op.call is not None and twice.call is not None:
            widths.scaled[op.index] = _scaled(op, twice)
    return widths


def path_of(captured: Captured) -> list[tuple[str, int]]:
    """Name and rank of every op: two batches that agree in it run the same code."""
    return [(op.name, len(op.shape)) for op in captured.tape.ops]


def sample_axes(
    model: nn.Module, prepared: QuantizedModel, inputs: Any, captured: Captured, size: int
) -> dict[int, int | None]:
    """Op -> axis of its first tensor that holds the samples, from a capture of one sample; None where there is none.

    The samples' share of that axis is its size / `size`: it may hold them folded with others, [B * heads, ...].
    """
    if size == 1:
        return {}
    one = capture(model, prepared.plan, cut(inputs, size, 0, 1), torch.inf)
    if [op.name for op in one.tape.ops] != [op.name for op in captured.tape.ops]:
        return {}
    found: dict[int, int | None] = {}
    for op, single in zip(captured.tape.ops, one.tape.ops, strict=True):
        pairs = list(enumerate(zip(single.shape, op.shape, strict=False)))
        grown = [d for d, (a, b) in pairs if a != b]
        fits = len(single.shape) == len(op.shape) and len(grown) == 1
        found[op.index] = grown[0] if fits and op.shape[grown[0]] == size * single.shape[grown[0]] else None
    return found


def _other(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != size:
        return value
    return value * 0.75 if value.is_floating_point() else value


def _joined(value: Any, size: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != size:
        return value
    return torch.cat([value, _other(value, size)])


def _doubled(single: Sequence[int], wide: Sequence[int]) -> int | None:
    """The one dim whose size doubles; None if no shape is the other with one dim doubled."""
    if len(single) != len(wide):
        return None
    differ = [d for d, (a, c) in enumerate(zip(single, wide, strict=True)) if a != c]
    return differ[0] if len(differ) == 1 and wide[differ[0]] == 2 * single[differ[0]] else None


def _axis(op: Op, single: Tensor, second: Tensor, wide: Tensor) -> int:
    axis = _doubled(single.shape, wide.shape)
    if axis is None or second.shape != single.shape:
        raise ReplayError(f"{op.name} does not grow with the batch")
    half = single.shape[axis]
    for part, begin in ((single, 0), (second, half)):
        found = wide.narrow(axis, begin, half)
        if not _close(part, found):
            raise ReplayError(f"{op.name} mixes the samples of a batch")
    return axis


def _close(part: Tensor, found: Tensor) -> bool:
    if not part.is_floating_point():
        return bool(torch.equal(part, found))
    gap, size = float((part - found).norm()), float(part.norm())
    if not math.isfinite(gap + size):  # masks: infinite, or too large to be squared
        a, b = part.double().nan_to_num(), found.double().nan_to_num()
        gap, size = float((a - b).norm()), float(a.norm())
    return gap <= TOLERANCE * size


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
            axis = None if a.shape == c.shape else _doubled(a.shape, c.shape)
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
