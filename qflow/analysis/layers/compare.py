"""Layer-by-layer comparison: every operator call of the float model against the calibrated one, on the same input.

One float pass captures the calls. Then each operator is run twice more: on the values of the calibrated model, which
gives the accumulated error, and on float inputs, which gives the error of the operator (with its fused group) alone. If
the accumulated error is large and the operator's own is small, the error comes from earlier operators. Both models
advance operator by operator, and values are freed after their last use. Operators that change the order of values
(topk, sort) use the order of the float model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.measures.layer_metrics import EMPTY, compare, relative_error
from qflow.analysis.measures.tables import Finding, LayerRow, LayerTable
from qflow.core.graph import OpNode
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, capture
from qflow.quant.replay.captured_ops import Ops, Values
from qflow.quant.trace.calling import batch_size
from qflow.quant.trace.tape import Op, Ref

GROWS = 2.0  # the error grows at an operator if it is at least so many times the error of the inputs
STANDS_OUT = 3.0  # ... and at least so many times the median error of an operator alone


def compare_layers(
    model: nn.Module,
    prepared: QuantizedModel,
    inputs: Any,
    *,
    memory_mb: int = 2048,
    on_op: Callable[[int], None] = lambda done: None,
) -> LayerTable:
    """Compare `model` with the calibrated `prepared` on one batch of model inputs.

    Raises ReplayError where the model's calls cannot be run one by one.
    """
    with torch.no_grad(), prepared.quantized():
        captured = capture(model, prepared.plan, inputs, memory_mb * 1e6 / 2, inner=True)
        walk = _Walk(model, prepared, captured)
        rows: list[LayerRow] = []
        for done, op in enumerate(walk.ops.ops, 1):
            rows.append(walk.row(op, len(rows)))
            on_op(done)
    rows = [replace(r, index=i) for i, r in enumerate(rows)]
    table = LayerTable(samples=batch_size(inputs), rows=tuple(rows))
    start = error_start(table, walk.sources)
    return replace(table, start=start, findings=(*walk.findings, *_findings(rows)))


class _Walk:
    """Runs the operators in order and holds their float, calibrated and single-operator values until the last use."""

    def __init__(self, model: nn.Module, prepared: QuantizedModel, captured: Captured) -> None:
        self.prepared, self.captured = prepared, captured
        self.ops = Ops(model, prepared, captured)
        self.plain: dict[int, Values] = {}
        self.calibrated: dict[int, Values] = {}
        self.single: dict[int, Values] = {}
        """Values inside a fused group when the group alone is run on float inputs."""
        self.sources: dict[str, tuple[str, ...]] = {}
        self.findings: list[Finding] = []
        self.nodes: dict[str, OpNode] = {}
        for node in prepared.graph.nodes:
            self.nodes.update(dict.fromkeys((node.name, *node.fused), node))
        self.last = {names[-1]: names for names in ([*_members(n)] for n in prepared.graph.nodes)}

    def row(self, op: Op, index: int) -> LayerRow:
        """Run one operator and compare its float, calibrated and single-operator values."""
        base, own, alone = self._values(op)
        if not self.findings and op.floating and bool(base[0].isnan().any()):
            text = "the float model itself gives NaN here first: check the bad case and the model"
            self.findings.append(Finding(op.name, "error", text))
        node = self.nodes.get(op.name)
        ends = node is None or op.name in self.prepared.plan.output_at or len(node.fused) == 0
        columns = compare(base[0], own[0]) if ends else dict.fromkeys(EMPTY)
        quantizer = self.prepared.outputs.get(self.prepared.plan.output_at.get(op.name, ""))
        active = quantizer is not None and quantizer.active
        integer = quantizer is not None and quantizer.dtype is not None and quantizer.dtype.is_integer
        scale = float(quantizer.scale) if quantizer is not None and active and integer else None
        atol = columns.get("Atol")
        row = LayerRow(
            index=index,
            mod_name=op.name,
            base_op_type=op.op_type,
            analy_op_type=_analysis_type(op, node, ends),
            shape=op.shape,
            quant_dtype=str(quantizer.dtype) if quantizer is not None and active else "float32",
            qscale=scale,
            max_atol_diff=atol,
            max_qscale_diff=None if atol is None or not scale else atol / scale,
            quantizer=node.name if node is not None and quantizer is not None and op.floating else "",
            single_error=relative_error(base[0], alone[0]) if ends and alone else None,
            **columns,  # type: ignore[arg-type]
        )
        self.sources[op.name] = tuple(self.captured.tape.ops[i].name for i in self.ops.reads[op.index])
        self._free(op)
        return row

    def _values(self, op: Op) -> tuple[Values, Values, Values]:
        """(float, calibrated, single-operator) values of one operator, which are kept for its readers."""
        if op.call is None:
            base: Values = (self.captured.inputs[op.index],)
            name = self.prepared.plan.output_at.get(op.name)
            own = base if name is None else (self.prepared.outputs[name](base[0]),)
            alone = own
        else:
            call = (op.call.args, op.call.kwargs)
            base = self.captured.values.get(op.index) or self._plain(op, call)
            own = self._run(op, base, *self.ops.arguments(call, lambda r: self.calibrated[r.op][r.position]))
            alone = self._run(op, base, *self.ops.arguments(call, self._alone))
        self.plain[op.index], self.calibrated[op.index] = base, own
        if op.floating and op.name not in self.prepared.plan.output_at and op.name in self.nodes:
            node = self.nodes[op.name]
            if node.quantizer is not None or node.fused:
                self.single[op.index] = alone
        return base, own, alone

    def _plain(self, op: Op, call: Any) -> Values:
        return self.ops.run(op, *self.ops.arguments(call, lambda r: self.plain[r.op][r.position]))

    def _alone(self, ref: Ref) -> Tensor:
        return (self.single if ref.op in self.single else self.plain)[ref.op][ref.position]

    def _run(self, op: Op, base: Values, args: Any, kwargs: Any) -> Values:
        ordered = self.ops.follows_order(op, lambda: base, args, kwargs)
        if ordered is None:
            return self.ops.quantized(op, self.prepared, args, kwargs)
        name = self.prepared.plan.output_at.get(op.name)
        return ordered if name is None else (self.prepared.outputs[name](ordered[0]), *ordered[1:])

    def _free(self, op: Op) -> None:
        for index in (op.index, *self.ops.reads[op.index]):
            if self.ops.last_use[index] <= op.index:
                for kept in (self.plain, self.calibrated, self.single, self.captured.values):
                    kept.pop(index, None)


def _members(node: OpNode) -> tuple[str, ...]:
    return (node.name, *node.fused)


def _analysis_type(op: Op, node: OpNode | None, ends: bool) -> str:
    """Type in the calibrated model: that of the whole group at its last member, Identity at the others."""
    if node is None or not node.fused:
        return op.op_type
    return group_type(node) if ends else "torch.nn.modules.linear.Identity"


def group_type(node: OpNode) -> str:
    """Type of a whole group in the calibrated model; the operator's own if nothing is fused into it."""
    kind = node.op_type.rsplit(".", 1)[-1]
    return f"qflow.{kind}{''.join(node.fused_types)}" if node.fused else node.op_type


def is_of(types: Collection[str], *kinds: str) -> bool:
    """True if one of `kinds`, in full or by its last part, is among `types`."""
    return any(name in types for kind in kinds for name in (kind, kind.rsplit(".", 1)[-1]))


def error_start(table: LayerTable, sources: dict[str, tuple[str, ...]]) -> str:
    """First operator where the error grows: GROWS times that of its inputs, STANDS_OUT times the median error alone.

    "" if there is none, because errors only add up. If the operator alone makes less than half of the error, its input
    made it, where a channel of large values can hide it in the relative error: the name of the input is returned.
    """
    own = [r.single_error for r in table.rows if r.single_error and r.quantizer]
    usual = statistics.median(own) if own else 0.0
    errors: dict[str, tuple[float, str]] = {}  # operator -> error, and the operator whose row has it
    for row in table.rows:
        before, source = max((errors.get(n, (0.0, "")) for n in sources.get(row.mod_name, ())), default=(0.0, ""))
        if row.error is None or row.single_error is None:  # inside a group: it has the error of its input
            errors[row.mod_name] = before, source
            continue
        errors[row.mod_name] = row.error, row.mod_name
        if row.error >= GROWS * before and row.error >= STANDS_OUT * usual:
            return row.mod_name if row.single_error >= 0.5 * row.error or not source else source
    return ""


def _findings(rows: Sequence[LayerRow]) -> tuple[Finding, ...]:
    found = []
    for row in rows:
        ends = (row.base_model_min, row.base_model_max, row.analy_model_min, row.analy_model_max)
        if any(v is not None and abs(v) == float("inf") for v in ends):
            found.append(Finding(row.mod_name, "check", "infinite values: a mask, or an overflow"))
    return tuple(found)


def filtered(table: LayerTable, prefixes: Sequence[str] = (), types: Sequence[str] = ()) -> LayerTable:
    """Rows whose name starts with one of `prefixes` or whose type is one of `types`; all rows if neither is given.

    A type is that of either model, in full or its last part. One of the two conditions is enough, as in the plugin.
    """
    if not prefixes and not types:
        return table

    def chosen(row: LayerRow) -> bool:
        return row.mod_name.startswith(tuple(prefixes)) or is_of(types, row.base_op_type, row.analy_op_type)

    return replace(table, rows=tuple(row for row in table.rows if chosen(row)))
