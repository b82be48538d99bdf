"""What each operator makes the device do: MACs, table look-ups, softmax elements, casts, weight bytes.

Counted on the fused graph at the deployed shape, under one qconfig. A convolution's channels are padded to
multiples of 16 per group (the fit cannot tell 16 from 32, and 64 is clearly worse); a depthwise convolution
counts as a GEMM call and weight bytes only, because its MAC coefficient cannot be identified from public rows.
Softmax elements stand for a whole attention core, so the two matmuls around a softmax are not counted again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import GEMM_KINDS, TRANSPARENT_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig

CHANNEL_ALIGN = 16
# Operators that rule BEV and DETR heads and that the public rows say nothing about.
UNVALIDATED = frozenset({OpKind.softmax, OpKind.grid_sample, OpKind.order})
# What the networks of the public rows are made of; with other operators the family is unseen.
VALIDATED = frozenset(
    {
        OpKind.input,
        OpKind.constant,
        OpKind.conv,
        OpKind.linear,
        OpKind.relu,
        OpKind.lut,
        OpKind.add,
        OpKind.mul,
        OpKind.concat,
    }
    | {OpKind.resize, OpKind.max_pool, OpKind.avg_pool, OpKind.move, OpKind.reduce, OpKind.norm}
)


@dataclass(frozen=True)
class OpFeatures:
    """Work of one operator. Elements and MACs are counts a frame; dtypes are what the engine computes in."""

    name: str
    kind: OpKind
    input_dtype: QDtype
    weight_dtype: QDtype | None
    output_dtype: QDtype | None
    gemm: int = 0
    macs: int = 0
    padded_macs: int = 0
    lut: int = 0
    softmax: int = 0
    cast: int = 0
    weight_bytes: int = 0
    float_out: int = 0
    elements: int = 0


def features(graph: ModelGraph, qconfig: QConfig) -> tuple[OpFeatures, ...]:
    """One row an operator of `graph`, traced at the deployed shape, under `qconfig`."""
    owners = {node.quantizer: node.name for node in graph.quantized}
    near_softmax = _attention_matmuls(graph)
    leaving = {producer for _, producer in graph.outputs}
    rows = []
    for node in graph.nodes:
        op = qconfig.ops[owners[node.quantizer]] if node.quantizer else None
        dtypes = [d for d in input_dtypes(graph, qconfig, node.name) if d != QDtype.float32]
        computed = max(dtypes, key=lambda d: d.rank, default=op.output if op and op.output else QDtype.qint8)
        if op is not None and op.output == QDtype.float16:
            computed = QDtype.float16
        counted = node.name not in near_softmax
        rows.append(
            OpFeatures(
                name=node.name,
                kind=node.kind,
                input_dtype=computed,
                weight_dtype=_weight_dtype(node, op, dtypes),
                output_dtype=op.output if op else None,
                gemm=int(node.kind in GEMM_KINDS and counted),
                macs=node.macs if counted else 0,
                padded_macs=_padded_macs(node) if counted else 0,
                lut=node.elements if node.kind == OpKind.lut else 0,
                softmax=node.elements if node.kind == OpKind.softmax else 0,
                cast=_casts(node, graph, qconfig, owners, computed),
                weight_bytes=_stored_bytes(node, op),
                float_out=node.elements if node.name in leaving else 0,
                elements=node.elements,
            )
        )
    return tuple(rows)


def _stored_bytes(node: OpNode, op: OpQConfig | None) -> int:
    """Bytes that are part of the model: weights, and constants at the dtype they are read in."""
    if node.kind == OpKind.constant and op and op.output:
        return node.elements * op.output.bits // 8
    return node.attrs.get("weights", 0) * ((op.weight.bits // 8) if op and op.weight else 0)


def _padded(channels: int) -> int:
    return -(-channels // CHANNEL_ALIGN) * CHANNEL_ALIGN


def _padded_macs(node: OpNode) -> int:
    """MACs with channels in and out (per group) padded; 0 for a depthwise convolution."""
    if not node.macs:
        return 0
    if node.kind == OpKind.matmul:
        inner, columns = node.attrs["inner"], node.shape[-1] if node.shape else 1
        return node.elements // max(columns, 1) * _padded(columns) * _padded(inner)
    groups = node.attrs["groups"]
    inner, outer = node.attrs["in"] // groups, node.attrs["out"] // groups
    if inner == 1 and groups > 1:
        return 0
    return node.positions * groups * _padded(inner) * _padded(outer) * node.attrs["kernel"]


def _weight_dtype(node: OpNode, op: OpQConfig | None, inputs: Sequence[QDtype]) -> QDtype | None:
    """Dtype of what the GEMM multiplies its (widest) input with."""
    if node.kind == OpKind.matmul:
        return min(inputs, key=lambda d: d.rank) if len(inputs) > 1 else QDtype.qint8
    if node.kind in GEMM_KINDS:
        return (op.weight if op else None) or QDtype.qint8  # a functional's weight is a constant
    return None


def _attention_matmuls(graph: ModelGraph) -> frozenset[str]:
    """The two matmuls of each attention core: one upstream of a softmax (through scaling, mask and moves), one right
    downstream. A matmul on one side only is no attention.
    """
    found: set[str] = set()
    upstream = {node.name: node.inputs for node in graph.nodes}
    scaling = {OpKind.mul, OpKind.arithmetic, OpKind.add, *TRANSPARENT_KINDS}
    for node in graph.nodes:
        if node.kind == OpKind.softmax:
            before = _nearest_matmuls(graph, upstream, node.name, scaling)
            after = _nearest_matmuls(graph, graph.consumers, node.name, set(TRANSPARENT_KINDS))
            if before and after:
                found |= before | after
    return frozenset(found)


def _nearest_matmuls(
    graph: ModelGraph, neighbours: Mapping[str, tuple[str, ...]], start: str, passing: set[OpKind]
) -> set[str]:
    found: set[str] = set()
    frontier = list(neighbours[start])
    while frontier:
        other = graph.by_name[frontier.pop()]
        if other.kind == OpKind.matmul:
            found.add(other.name)
        elif other.kind in passing:
            frontier.extend(neighbours[other.name])
    return found


def _casts(node: OpNode, graph: ModelGraph, qconfig: QConfig, owners: dict[str | None, str], to: QDtype) -> int:
    """Elements of inputs that must change dtype: because another input is wider, because the operator asks for it,
    or at the border between integers and fp16.
    """
    if node.kind in TRANSPARENT_KINDS:
        return 0
    op = qconfig.ops[owners[node.quantizer]] if node.quantizer else None
    total = 0
    for position, producer in enumerate(node.inputs):
        held = {qconfig.ops[owners[graph.by_name[s].quantizer]].output for s in graph.source(producer)}
        asked = op.input[position] if op and op.input and position < len(op.input) else None
        several = len(node.inputs) > 1 and node.kind != OpKind.matmul and any(d not in (None, to) for d in held)
        border = any(d is not None and (d == QDtype.float16) != (to == QDtype.float16) for d in held)
        if border or several or (asked is not None and any(d != asked for d in held)):
            total += graph.by_name[producer].elements
    return total
