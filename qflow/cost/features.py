"""What each operator makes the device do: MACs, table look-ups, softmax elements, casts, weight bytes.

Counted on the fused graph at the deployed shape, under one qconfig. A convolution's channels are padded to
multiples of 16 per group (the fit cannot tell 16 from 32, and 64 is clearly worse); a depthwise convolution
counts as a GEMM call and weight bytes only, because its MAC coefficient cannot be identified from public rows.
Softmax elements stand for a whole attention core, so the two matmuls around a softmax are not counted again.
"""

from __future__ import annotations

from dataclasses import dataclass

from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import GEMM_KINDS, TRANSPARENT_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import QConfig

CHANNEL_ALIGN = 16
# Operators that rule BEV and DETR heads and that the public rows say nothing about.
UNVALIDATED = frozenset({OpKind.softmax, OpKind.grid_sample, OpKind.order})


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
        macs, padded = _macs(node) if node.name not in near_softmax else (0, 0)
        rows.append(
            OpFeatures(
                name=node.name,
                kind=node.kind,
                input_dtype=computed,
                weight_dtype=op.weight if op else None,
                output_dtype=op.output if op else None,
                gemm=int(node.kind in GEMM_KINDS and node.name not in near_softmax),
                macs=macs,
                padded_macs=padded,
                lut=node.elements if node.kind == OpKind.lut else 0,
                softmax=node.elements if node.kind == OpKind.softmax else 0,
                cast=_casts(node, graph, qconfig, owners, computed),
                weight_bytes=node.attrs.get("weights", 0) * ((op.weight.bits // 8) if op and op.weight else 0),
                float_out=node.elements if node.name in leaving else 0,
                elements=node.elements,
            )
        )
    return tuple(rows)


def _padded(channels: int) -> int:
    return -(-channels // CHANNEL_ALIGN) * CHANNEL_ALIGN


def _macs(node: OpNode) -> tuple[int, int]:
    """MACs as they are, and with channels in and out (per group) padded."""
    if node.kind == OpKind.matmul:
        inner = node.attrs.get("inner", 0)
        columns = node.shape[-1] if node.shape else 1
        return node.elements * inner, node.elements // max(columns, 1) * _padded(columns) * _padded(inner)
    if not node.attrs or node.kind not in GEMM_KINDS:
        return 0, 0
    groups, kernel = node.attrs["groups"], node.attrs["kernel"]
    inner, outer = node.attrs["in"] // groups, node.attrs["out"] // groups
    positions = node.elements // node.attrs["out"]
    if node.kind == OpKind.conv_transpose:  # each input position meets the whole kernel
        positions = max(positions // max(kernel, 1), 1)
    macs = positions * groups * inner * outer * kernel
    if inner == 1 and groups > 1:  # depthwise
        return macs, 0
    return macs, positions * groups * _padded(inner) * _padded(outer) * kernel


def _attention_matmuls(graph: ModelGraph) -> frozenset[str]:
    """Matmuls right before and after a softmax (looked up through scaling and moves)."""
    found: set[str] = set()
    passing = {OpKind.mul, OpKind.arithmetic, OpKind.add, *TRANSPARENT_KINDS}
    upstream = {node.name: node.inputs for node in graph.nodes}
    for node in graph.nodes:
        if node.kind != OpKind.softmax:
            continue
        for neighbours in (upstream, graph.consumers):
            frontier = list(neighbours[node.name])
            while frontier:
                other = graph.by_name[frontier.pop()]
                if other.kind == OpKind.matmul:
                    found.add(other.name)
                elif other.kind in passing:
                    frontier.extend(neighbours[other.name])
    return frozenset(found)


def _casts(node: OpNode, graph: ModelGraph, qconfig: QConfig, owners: dict[str | None, str], to: QDtype) -> int:
    """Elements of inputs that must change dtype because another input of this operator is wider."""
    if node.kind in TRANSPARENT_KINDS or node.kind == OpKind.matmul or len(node.inputs) < 2:
        return 0
    total = 0
    for producer in node.inputs:
        held = {qconfig.ops[owners[graph.by_name[s].quantizer]].output for s in graph.source(producer)}
        if any(d is not None and d != to for d in held):
            total += graph.by_name[producer].elements
    return total
