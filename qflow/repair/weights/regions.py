"""The parts of a network that a reconstruction compares with float: layers, and blocks of layers.

A layer is one operator with a weight, with the batch norm that is folded into it and the activation function that
follows. A block is a stretch of operators with one value going in and one coming out, found in the traced graph:

    first   from an add (or subtraction, or another join) back to the value from which both its branches come: a
            residual block, an attention block
    then    the operators of one module of the user's, the smallest modules first

Either takes the activation function behind it along. A value that no weight has entered (a mask made of the inputs) is
not counted. Blocks do not overlap, hold two weights or more, and at most `LARGEST_BLOCK` of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qflow.core.graph import WEIGHTED_KINDS, OpKind
from qflow.quant.replay.captured_ops import Ops
from qflow.quant.trace.tape import Op
from qflow.repair.base.operators import Skipped

LARGEST_BLOCK = 8
"""Weights of a block at most: the more of them, the easier they fit the few samples instead of the network."""
_JOINS = frozenset({OpKind.add, OpKind.arithmetic})
_ACTIVATIONS = frozenset({OpKind.relu, OpKind.lut})
SEVERAL_CALLS = "it is called several times, with other inputs each time"
NOT_REACHED = "no output depends on it"


@dataclass(frozen=True)
class Region:
    """Operators (indices on the tape, in order) of which the last gives the result that is compared."""

    ops: tuple[int, ...]
    weights: tuple[str, ...]
    """Module paths of its weights that can be rounded anew, in order of execution."""
    layers: tuple[Region, ...] = ()
    """The layers of a block; empty for a layer."""

    @property
    def name(self) -> str:
        """`conv1`, or `conv1 to conv3` for a block."""
        return self.weights[0] if len(self.weights) == 1 else f"{self.weights[0]} to {self.weights[-1]}"

    @property
    def start(self) -> int:
        """Index of its first operator."""
        return self.ops[0]

    @property
    def end(self) -> int:
        """Index of its last operator."""
        return self.ops[-1]


def regions_of(ops: Ops, chosen: Collection[str]) -> tuple[list[Region], Skipped]:
    """Blocks, and layers outside of them, in order of execution; and which of the `chosen` weights are in none."""
    flow = _Flow(ops)
    calls = Counter(op.module for op in ops.ops if op.module in chosen)
    layers = [flow.layer(op) for op in ops.ops if op.module in chosen and calls[op.module] == 1]
    blocks: list[Region] = []
    for begin, end in flow.candidates():
        block = flow.block(begin, end, layers)
        if block and not any(block.start <= other.end and other.start <= block.end for other in blocks):
            blocks.append(block)
    inside = {layer.start for block in blocks for layer in block.layers}
    alone = [_outside(layer, blocks) for layer in layers if layer.start not in inside]
    skipped = {name: SEVERAL_CALLS if calls[name] else NOT_REACHED for name in chosen if calls[name] != 1}
    return sorted([*blocks, *alone], key=lambda region: region.start), skipped


def _outside(layer: Region, blocks: Sequence[Region]) -> Region:
    """The layer without an activation function that belongs to a block."""
    taken = {index for block in blocks for index in block.ops}
    return replace(layer, ops=tuple(index for index in layer.ops if index not in taken))


class _Flow:
    """Which operator reads which."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.order = [op.index for op in ops.ops]
        self.by_index: Mapping[int, Op] = {op.index: op for op in ops.ops}
        self.readers: dict[int, list[int]] = {index: [] for index in self.order}
        for op in ops.ops:
            for read in ops.reads[op.index]:
                self.readers[read].append(op.index)
        self.leaving = {ref.op for _, ref in ops.outputs}
        self.weighted: set[int] = set()
        """Operators whose result depends on a weight."""
        for op in ops.ops:
            if op.kind in WEIGHTED_KINDS or self._reads(op.index):
                self.weighted.add(op.index)

    def _reads(self, index: int) -> set[int]:
        """The operators that this one reads and that depend on a weight."""
        return set(self.ops.reads[index]) & self.weighted

    def layer(self, op: Op) -> Region:
        found = [op.index]
        while (following := self._alone(found[-1])) and following.owner in self.ops.folded:
            found.append(following.index)
        return Region((*found, *self._activation(found[-1])), (str(op.module),))

    def _alone(self, index: int) -> Op | None:
        """The one operator that reads this one and nothing else."""
        readers = self.readers[index]
        if len(readers) != 1 or index in self.leaving or self.ops.reads[readers[0]] != {index}:
            return None
        return self.by_index[readers[0]]

    def _activation(self, index: int) -> tuple[int, ...]:
        following = self._alone(index)
        return (following.index,) if following is not None and following.kind in _ACTIVATIONS else ()

    def candidates(self) -> Iterator[tuple[int, int]]:
        """First and last operator of what may be a block, as places in the order of execution."""
        for place, index in enumerate(self.order):
            if self.by_index[index].kind in _JOINS and len(self._reads(index)) > 1:
                begin = place
                while begin and len(self._entries(begin, place)) > 1:
                    begin -= 1
                yield begin, place
        modules: dict[str, list[int]] = {}
        for place, index in enumerate(self.order):
            if self.by_index[index].call is not None:
                for path in _containers(self.by_index[index]):
                    modules.setdefault(path, []).append(place)
        for places in sorted(modules.values(), key=lambda places: places[-1] - places[0]):
            yield places[0], places[-1]

    def _entries(self, begin: int, end: int) -> set[int]:
        """What operators from place `begin` to `end` read of earlier ones."""
        inside = set(self.order[begin : end + 1])
        return {read for index in inside for read in self._reads(index)} - inside

    def block(self, begin: int, end: int, layers: Sequence[Region]) -> Region | None:
        """The region from place `begin` to `end`, with an activation function behind it; None if it is no block."""
        inside = [index for index in self.order[begin : end + 1] if self.by_index[index].call is not None]
        inside += self._activation(inside[-1]) if inside else ()
        members = set(inside)
        own = tuple(layer for layer in layers if members.issuperset(layer.ops))
        weights = tuple(name for layer in own for name in layer.weights)
        if not 2 <= len(weights) <= LARGEST_BLOCK or len(self._entries(begin, end)) > 1:
            return None
        if members & self.ops.ordering or any(self.by_index[index].kind == OpKind.skipped for index in inside):
            return None
        if self.order.index(inside[-1]) - begin + 1 != len(inside):
            return None
        for index in inside[:-1]:
            if index in self.leaving or not members.issuperset(self.readers[index]):
                return None
        return Region(tuple(inside), weights, own)


def _containers(op: Op) -> list[str]:
    """Paths of the modules of the user's in which the operator runs, without the whole model."""
    path = op.name.partition("[")[0].partition("(")[0]
    parts = path.split(".") if path else []
    if op.module is not None:
        parts = parts[:-1]
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
