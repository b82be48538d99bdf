"""The values of the float network and of the quantized one, operator by operator, on a few samples at a time.

Calibration batches are cut into chunks. Each chunk is captured once on the float model (quant/replay), so its operators
can be run alone, with the shapes and constants of these very samples. Both networks advance together and hold only the
values that later operators read. So a stretch of operators can be run many times with other weights on the inputs that
it has in the quantized network, and its result compared with that of the float network, at the cost of two passes for
the whole network.

A value of the quantized network is held as it is before its quantizer, which acts where it is read. With `drop`, each
element is read in float with probability 1/2 (QDrop, Wei et al., ICLR 2022, arXiv 2203.05740): the codes then suit more
than the rounding errors of these samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, ReplayError, capture
from qflow.quant.replay.captured_ops import Ops, Values, Weights
from qflow.quant.replay.widen import path_of
from qflow.quant.trace.calling import cut
from qflow.quant.trace.tape import Op, Ref
from qflow.repair.weights.regions import Region

CHUNK = 16
"""Samples of a chunk at most: it is the batch of one training iteration."""
LEAST = 4
"""Chunks at least, if there are as many samples: the last one in four decides when training stops."""
MEMORY = 2**29
"""Bytes of the values of all chunks, of both networks together. Samples beyond it are left out."""


@dataclass
class Chunk:
    """A few samples with their captured operators, and what is held of their values (operator -> its results)."""

    ops: Ops
    captured: Captured
    size: int
    plain: dict[int, Values] = field(default_factory=dict)
    """Results of the float network."""
    quantized: dict[int, Values] = field(default_factory=dict)
    """Results of the quantized network, before their quantizers."""

    @property
    def bytes(self) -> int:
        """Size of the values that are held."""
        return sum(_bytes(values) for held in (self.plain, self.quantized) for values in held.values())


@dataclass
class Samples:
    """The chunks of the samples whose values fit into `MEMORY`."""

    chunks: list[Chunk]
    forwards: int
    """Samples that were run through the model to capture them."""

    @property
    def used(self) -> int:
        """The number of samples."""
        return sum(chunk.size for chunk in self.chunks)


def samples_of(model: nn.Module, prepared: QuantizedModel, batches: Sequence[tuple[Any, int]]) -> Samples:
    """Cut batches into chunks and capture each on the float `model`; those beyond `MEMORY` are left out.

    Raises ReplayError if operators cannot be run one by one, if samples take different paths through the model, or if
    two chunks do not fit; an operator may raise anything.
    """
    most = min(CHUNK, max(1, sum(size for _, size in batches) // LEAST))
    parts = [
        (cut(inputs, size, begin, min(begin + most, size)), min(most, size - begin))
        for inputs, size in batches
        for begin in range(0, size, most)
    ]
    found: list[Chunk] = []
    room = 0
    for inputs, size in parts:
        captured = capture(model, prepared.plan, inputs, 0)
        chunk = Chunk(Ops(model, prepared, captured), captured, size)
        if not found:
            room = int(MEMORY // peak(prepared, chunk))
            if min(room, len(parts)) < 2:
                raise ReplayError(f"it takes two chunks of {size} samples, but {room} of {len(parts)} fit into memory")
        elif path_of(captured) != path_of(found[0].captured):
            raise ReplayError("its samples take different paths through the model")
        found.append(chunk)
        if len(found) == room:
            break
    return Samples(found, sum(chunk.size for chunk in found) + 2 * found[0].size)


def peak(prepared: QuantizedModel, chunk: Chunk) -> int:
    """Most bytes that are held of this chunk: what a walk holds, and a block's input and float result beside it."""
    walk, most, largest = Walk(prepared, [chunk]), 1, 0
    with torch.no_grad(), prepared.quantized():
        for op in chunk.ops.ops:
            walk.advance(op.index + 1)
            most = max(most, chunk.bytes)
            largest = max(largest, _bytes(chunk.plain.get(op.index, ())))
    chunk.plain, chunk.quantized = {}, {}
    return most + 2 * largest


class Walk:
    """The place that both networks have reached: operators before `at` have run, in the float one those before `ahead`.

    Use it with the quantizers on. `forwards` counts samples run through the model, by multiply-accumulates.
    """

    def __init__(self, prepared: QuantizedModel, chunks: Sequence[Chunk]) -> None:
        self.prepared, self.chunks = prepared, chunks
        self.at = self.ahead = 0
        self.forwards = 0.0
        nodes = prepared.graph.nodes
        macs = {member: node.macs for node in nodes for member in (node.name, *node.fused)}
        weighted = [op for op in chunks[0].ops.ops if op.name in macs and op.module in prepared.weights]
        total = sum(macs[op.name] for op in weighted) or 1
        self.share = {op.index: macs[op.name] / total for op in weighted}
        """Operator -> its share of the model's multiply-accumulates."""
        for chunk in chunks:
            chunk.plain, chunk.quantized = {}, {}

    @torch.no_grad()
    def advance(self, end: int, plain: int = 0) -> None:
        """Run the operators before `end` in both networks, in the float one those before `plain` if it is later."""
        for chunk in self.chunks:
            for op in chunk.ops.ops:
                if self.ahead <= op.index < max(end, plain):
                    chunk.plain[op.index] = self._float(chunk, op)
                    self._count(op.index, chunk.size)
                if self.at <= op.index < end:
                    chunk.quantized[op.index] = self._quantized(chunk, op)
                    self._count(op.index, chunk.size)
                    _free(chunk, chunk.quantized, op)
                if self.ahead <= op.index < max(end, plain):
                    _free(chunk, chunk.plain, op)
        self.at, self.ahead = max(self.at, end), max(self.ahead, end, plain)

    def place(self) -> tuple[int, list[dict[int, Values]]]:
        """Where the quantized network is now, for `back`."""
        return self.at, [dict(chunk.quantized) for chunk in self.chunks]

    def back(self, place: tuple[int, list[dict[int, Values]]]) -> None:
        """Take the quantized network back, to run on from there with other weights."""
        self.at = place[0]
        for chunk, held in zip(self.chunks, place[1], strict=True):
            chunk.quantized = dict(held)

    def result(self, chunk: Chunk, region: Region, weights: Weights, drop: torch.Generator | None = None) -> Tensor:
        """The result of a region before its quantizer, from the inputs where the quantized network is now."""
        values: dict[int, Values] = {}
        for index in region.ops:
            op = chunk.ops.tape.ops[index]
            assert op.call is not None
            call = (op.call.args, op.call.kwargs)
            args, kwargs = chunk.ops.arguments(call, lambda ref: self._read(chunk, values, ref, drop))
            values[index] = chunk.ops.before_quantizer(op, self.prepared, args, kwargs, weights)
            self._count(index, chunk.size * (3 if torch.is_grad_enabled() else 1))
        return values[region.end][0]

    def _float(self, chunk: Chunk, op: Op) -> Values:
        if op.call is None:
            return (chunk.captured.inputs[op.index],)
        call = (op.call.args, op.call.kwargs)
        return chunk.ops.run(op, *chunk.ops.arguments(call, lambda ref: chunk.plain[ref.op][ref.position]))

    def _quantized(self, chunk: Chunk, op: Op) -> Values:
        if op.call is None:
            return (chunk.captured.inputs[op.index],)
        call = (op.call.args, op.call.kwargs)
        args, kwargs = chunk.ops.arguments(call, lambda ref: self._read(chunk, {}, ref, None))
        ordered = chunk.ops.follows_order(op, lambda: chunk.plain[op.index], args, kwargs)
        return chunk.ops.before_quantizer(op, self.prepared, args, kwargs) if ordered is None else ordered

    def _read(self, chunk: Chunk, values: dict[int, Values], ref: Ref, drop: torch.Generator | None) -> Tensor:
        """A value of the quantized network, through its quantizer."""
        value = (values if ref.op in values else chunk.quantized)[ref.op][ref.position]
        name = self.prepared.plan.output_at.get(chunk.ops.tape.ops[ref.op].name)
        if name is None or ref.position or not self.prepared.outputs[name].active:
            return value
        quantized: Tensor = self.prepared.outputs[name](value)
        if drop is None:
            return quantized
        return torch.where(torch.rand(value.shape, generator=drop).to(value.device) < 0.5, quantized, value)

    def _count(self, index: int, samples: int) -> None:
        self.forwards += self.share.get(index, 0.0) * samples


def _free(chunk: Chunk, values: dict[int, Values], op: Op) -> None:
    for index in (op.index, *chunk.ops.reads[op.index]):
        if chunk.ops.last_use[index] <= op.index:
            values.pop(index, None)


def _bytes(values: Values) -> int:
    return sum(value.numel() * value.element_size() for value in values)
