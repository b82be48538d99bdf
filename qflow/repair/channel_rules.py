"""Where an operator that treats all channels alike, or moves whole channels, puts the channel axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qflow.core.graph import OpKind, OpNode

PASSING_KINDS = frozenset({OpKind.max_pool, OpKind.avg_pool, OpKind.resize})
_RULES: Mapping[str, str] = {
    "passing": "ReLU LeakyReLU PReLU Identity Dropout Dropout1d Dropout2d Dropout3d relu leaky_relu prelu identity "
    "dropout dropout1d dropout2d dropout3d contiguous clone detach neg pad roll "
    "ZeroPad1d ZeroPad2d ZeroPad3d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d",
    "reshaping": "Flatten Unflatten flatten unflatten reshape view view_as squeeze unsqueeze",
    "turning": "permute transpose swapaxes swapdims movedim moveaxis t T mT getitem select narrow unbind "
    "expand expand_as repeat",
    "reducing": "mean sum amax amin",
    "adding": "add sub maximum minimum",
    "scaling": "mul div",
}
RULE_OF = {name: rule for rule, names in _RULES.items() for name in names.split()}


@dataclass(frozen=True)
class Labels:
    """The variables along the channel axis of one tensor."""

    axis: int
    ids: tuple[int, ...]


def moved(node: OpNode, read: Labels, old: tuple[int, ...]) -> Labels | None:
    """Return the labels of the result of `node`, which reads a tensor of shape `old`; None if the axis is in doubt."""
    new, count, kind = node.shape, len(read.ids), node.op_type.rpartition(".")[2]
    if node.kind in PASSING_KINDS or RULE_OF[kind] == "passing":
        return read if len(old) == len(new) and new[read.axis] == count else None
    if RULE_OF[kind] == "reshaping":
        return _reshaped(read, old, new)
    axes = [i for i, size in enumerate(new) if size == count]
    return Labels(axes[0], read.ids) if len(axes) == 1 and old.count(count) == 1 else None


def _reshaped(read: Labels, old: tuple[int, ...], new: tuple[int, ...]) -> Labels | None:
    """Values keep their order: the channels stay an axis, or become one with all axes after them."""
    if math.prod(old) != math.prod(new):
        return None
    outer, inner = math.prod(old[: read.axis]), math.prod(old[read.axis + 1 :])
    for axis, size in enumerate(new):
        if math.prod(new[:axis]) != outer:
            continue
        if size == len(read.ids):
            return Labels(axis, read.ids)
        if size == len(read.ids) * inner:
            return Labels(axis, tuple(variable for variable in read.ids for _ in range(inner)))
    return None
