"""What the device does to a requested qconfig, applied and explained before anything runs.

The real tool chain lowers int16 to int8 silently in several places. The same rules are applied here, as data
(conf/device/*.yaml), and every operator that gets something else than was asked carries the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import GEMM_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig


@dataclass(frozen=True)
class DeviceRules:
    """Dtype rules of one march under one OpenExplorer release; kinds are `OpKind` values."""

    march: str
    oe_version: str
    int8_inputs: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Operator kind -> input positions that take int8 only (the plugin's canonicaliser)."""
    int8_outputs: Sequence[str] = ()
    """Operator kinds whose output is int8 only."""
    fused_add_int8: bool = True
    """conv + add fused: both inputs int8 on nash-e/m."""
    dual_int16: bool = False
    """int16 weight with int16 input in one GEMM (J6M: from OE 3.2)."""
    matmul_int16_inputs: int = 1
    """How many inputs of a matmul may be int16."""
    float16_kinds: Sequence[str] = ()
    """Operator kinds that can run in fp16 (the vector unit); others are refused."""


def apply_rules(
    graph: ModelGraph, requested: QConfig, rules: DeviceRules, scores: Mapping[str, float] | None = None
) -> QConfig:
    """The qconfig that the device will run, each change with its reason in `OpQConfig.fallback`.

    `scores` rank the two producers of a matmul: the more sensitive one keeps int16 (without scores the one that
    comes first). Raises ConfigError for what no fallback cures: int16 x int16, fp16 where there is no float path.
    """
    ops = dict(requested.ops)
    owners = {n.quantizer: n.name for n in graph.quantized}

    def owner(name: str) -> str:
        return owners[graph.by_name[name].quantizer]

    def lower(name: str, reason: str) -> None:
        op = ops[owner(name)]
        if op.output == QDtype.qint16:
            ops[owner(name)] = replace(op, output=QDtype.qint8, fallback=reason)

    for node in graph.nodes:
        if node.kind.value in rules.int8_outputs and node.quantizer is not None:
            lower(node.name, f"the output of {node.kind} is int8 only")
    for node in graph.nodes:
        for producer, reason in _int8_only(node, rules):
            for source in graph.source(producer):
                lower(source, reason)
    for node in graph.nodes:
        if node.kind == OpKind.matmul:
            for source in _surplus(node, graph, ops, owner, rules.matmul_int16_inputs, scores or {}):
                lower(source, f"{node.name} takes {rules.matmul_int16_inputs} int16 input only")
    applied = QConfig(march=rules.march, ops=ops)
    _refuse(graph, applied, rules, owner)
    return applied


def input_dtypes(graph: ModelGraph, qconfig: QConfig, name: str) -> tuple[QDtype, ...]:
    """Dtypes of the tensors that the operator reads, through transparent operators; float32 where unquantized."""
    owners = {n.quantizer: n.name for n in graph.quantized}
    dtypes = []
    for producer in graph.by_name[name].inputs:
        for source in graph.source(producer):
            output = qconfig.ops[owners[graph.by_name[source].quantizer]].output
            dtypes.append(output if output is not None else QDtype.float32)
    return tuple(dtypes)


def _int8_only(node: OpNode, rules: DeviceRules) -> list[tuple[str, str]]:
    positions = set(rules.int8_inputs.get(node.kind.value, ()))
    reason = f"{node.name} ({node.kind}) takes int8 input only"
    if node.fused_add and rules.fused_add_int8:
        positions |= {0, 1}
        reason = f"{node.name} (conv and add fused) takes int8 inputs only"
    return [(producer, reason) for i, producer in enumerate(node.inputs) if i in positions]


def _surplus(
    node: OpNode,
    graph: ModelGraph,
    ops: Mapping[str, OpQConfig],
    owner: Callable[[str], str],
    allowed: int,
    scores: Mapping[str, float],
) -> list[str]:
    """Producers of a matmul that lose their int16: all positions but the `allowed` most sensitive.

    Positions are counted, not producers: of q @ q^T both inputs are q, and q loses it.
    """
    wide = []
    for producer in node.inputs:
        found = [owner(s) for s in graph.source(producer) if ops[owner(s)].output == QDtype.qint16]
        wide.extend(found[:1])
    ranked = sorted(wide, key=lambda name: -scores.get(name, 0.0)) if scores else wide
    return ranked[allowed:]


def _refuse(graph: ModelGraph, qconfig: QConfig, rules: DeviceRules, owner: Callable[[str], str]) -> None:
    for node in graph.nodes:
        if node.quantizer is None:
            continue
        op: OpQConfig = qconfig.ops[owner(node.name)]
        inputs = input_dtypes(graph, qconfig, node.name)
        if op.weight == QDtype.qint16 and QDtype.qint16 in inputs and not rules.dual_int16:
            raise ConfigError(
                f"{rules.march} under OpenExplorer {rules.oe_version} has no int16 x int16, but got int16 weight and "
                f"int16 input for {node.name}. Keep the weight at qint8, or its producer's output at qint8."
            )
        if QDtype.float32 in (op.output, op.weight):
            raise ConfigError(
                f"{rules.march} computes in qint8, qint16 and some float16, but got float32 for {node.name}."
            )
        floats = QDtype.float16 in (op.output, op.weight) and node.kind.value not in rules.float16_kinds
        if floats or (QDtype.float16 in inputs and node.kind in GEMM_KINDS):
            where = "GEMM engine has no float path" if node.kind in GEMM_KINDS else "vector unit does not run it"
            what = "fp16 output" if floats else "fp16 input"
            raise ConfigError(
                f"fp16 on {rules.march} is for {', '.join(rules.float16_kinds) or 'no operator'}, but got {what} for "
                f"{node.name} ({node.kind}): the {where}. Use qint16."
            )
