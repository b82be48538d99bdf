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

from qflow.analysis.layers.forwards import by_forwards
from qflow.analysis.layers.rows import Rows, Twin
from qflow.analysis.measures.pair_sums import same_values
from qflow.analysis.measures.tables import Finding, LayerRow, LayerTable, also
from qflow.core.graph import ModelGraph, OpKind
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import Captured, capture, reason_of
from qflow.quant.replay.captured_ops import Ops, Values, Weights
from qflow.quant.trace.calling import batch_size
from qflow.quant.trace.tape import Op, Ref

GROWS = 2.0  # the error grows at an operator if it is at least so many times the error of the inputs
STANDS_OUT = 3.0  # ... and at least so many times the median error of an operator alone
BY_FORWARDS = "full forwards were compared, without the error of each operator alone and where the error starts"


def compare_layers(
    model: nn.Module,
    prepared: QuantizedModel,
    inputs: Any,
    *,
    memory_mb: int = 2048,
    on_op: Callable[[int], None] = lambda done: None,
) -> LayerTable:
    """Compare `model` with the calibrated `prepared` on one batch of model inputs.

    Where the model's calls cannot be run one by one, full forward passes are compared: a finding gives the reason, and
    what needs operators run alone is empty.
    """
    with torch.no_grad(), prepared.quantized():
        try:
            rows, start, findings = _one_by_one(model, prepared, inputs, memory_mb * 1e6 / 2, on_op)
        except Exception as error:
            reason = reason_of(error)
            rows, findings = by_forwards(model, prepared, inputs, memory_mb * 1e6, on_op)
            start, findings = "", [Finding("layers", "info", f"{BY_FORWARDS}: {reason}"), *findings]
    rows = [replace(r, index=i) for i, r in enumerate(rows)]
    return LayerTable(
        batch_size(inputs), tuple(rows), start, (*findings, *_findings(rows), *_absent(rows, prepared.graph))
    )


def _one_by_one(
    model: nn.Module, prepared: QuantizedModel, inputs: Any, memory: float, on_op: Callable[[int], None]
) -> tuple[list[LayerRow], str, list[Finding]]:
    """The rows, the operator where the error starts to grow, and findings. An operator may raise anything here."""
    walk = _Walk(model, prepared, capture(model, prepared.plan, inputs, memory, inner=True))
    rows: list[LayerRow] = []
    for done, op in enumerate(walk.ops.ops, 1):
        row = walk.row(op)
        if op.name in walk.captured.tape.names:  # others only pass on what was written into a tensor (replay/views.py)
            rows.append(row)
        on_op(done)
    return rows, error_start(rows, walk.sources), walk.rows.findings


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
        self.made: dict[int, LayerRow] = {}
        self.rows = Rows(prepared)

    def row(self, op: Op) -> LayerRow:
        """Run one operator and compare its float, calibrated and single-operator values."""
        base, own, alone = self._values(op)
        twin = self._twin(op, base, own, alone)
        row = self.rows.row(op.name, op.op_type, base[0], own[0], alone[0] if alone else None, twin)
        self.made[op.index] = row
        self.sources[op.name] = tuple(self.captured.tape.ops[i].name for i in self.ops.reads[op.index])
        self._free(op)
        return row

    def _twin(self, op: Op, base: Values, own: Values, alone: Values) -> Twin | None:
        """The row of an operator that this one reads, if this one gives its three values unchanged."""
        for index in self.ops.reads[op.index]:
            read = self.plain[index][0], self.calibrated[index][0], self._alone(Ref(index, 0))
            given = base[0], own[0], alone[0]
            if all(same_values(a, b) for a, b in zip(read, given, strict=True)):
                alike = all(a.shape == b.shape and a.stride() == b.stride() for a, b in zip(read, given, strict=True))
                return Twin(self.made[index], alike)
        return None

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
            weight = self.ops.quantized_weight(op, self.prepared)
            weights: Weights = {} if weight is None else {op.module or "": weight}
            accumulated = self.ops.arguments(call, lambda r: self.calibrated[r.op][r.position])
            own = self._run(op, base, *accumulated, weights)
            alone = self._run(op, base, *self.ops.arguments(call, self._alone), weights)
        self.plain[op.index], self.calibrated[op.index] = base, own
        if op.floating and op.name not in self.prepared.plan.output_at and op.name in self.rows.nodes:
            node = self.rows.nodes[op.name]
            if node.quantizer is not None or node.fused:
                self.single[op.index] = alone
        return base, own, alone

    def _plain(self, op: Op, call: Any) -> Values:
        return self.ops.run(op, *self.ops.arguments(call, lambda r: self.plain[r.op][r.position]))

    def _alone(self, ref: Ref) -> Tensor:
        return (self.single if ref.op in self.single else self.plain)[ref.op][ref.position]

    def _run(self, op: Op, base: Values, args: Any, kwargs: Any, weights: Weights) -> Values:
        ordered = self.ops.follows_order(op, lambda: base, args, kwargs)
        if ordered is None:
            return self.ops.quantized(op, self.prepared, args, kwargs, weights)
        name = self.prepared.plan.output_at.get(op.name)
        return ordered if name is None else (self.prepared.outputs[name](ordered[0]), *ordered[1:])

    def _free(self, op: Op) -> None:
        for index in (op.index, *self.ops.reads[op.index]):
            if self.ops.last_use[index] <= op.index:
                for kept in (self.plain, self.calibrated, self.single, self.captured.values):
                    kept.pop(index, None)


def is_of(types: Collection[str], *kinds: str) -> bool:
    """True if one of `kinds`, in full or by its last part, is among `types`."""
    return any(name in types for kind in kinds for name in (kind, kind.rsplit(".", 1)[-1]))


def error_start(rows: Sequence[LayerRow], sources: dict[str, tuple[str, ...]]) -> str:
    """First operator where the error grows: GROWS times that of its inputs, STANDS_OUT times the median error alone.

    "" if there is none, because errors only add up. If the operator alone makes less than half of the error, its input
    made it, where a channel of large values can hide it in the relative error: the name of the input is returned.
    """
    own = [r.single_error for r in rows if r.single_error and r.quantizer]
    usual = statistics.median(own) if own else 0.0
    errors: dict[str, tuple[float, str]] = {}  # operator -> error, and the operator whose row has it
    for row in rows:
        before, source = max((errors.get(n, (0.0, "")) for n in sources.get(row.mod_name, ())), default=(0.0, ""))
        if row.error is None or row.single_error is None:  # inside a group: it has the error of its input
            errors[row.mod_name] = before, source
            continue
        errors[row.mod_name] = row.error, row.operator
        if row.error >= GROWS * before and row.error >= STANDS_OUT * usual:
            return row.operator if row.single_error >= 0.5 * row.error or not source else source
    return ""


def _findings(rows: Sequence[LayerRow]) -> tuple[Finding, ...]:
    found = []
    for row in rows:
        ends = (row.base_model_min, row.base_model_max, row.analy_model_min, row.analy_model_max)
        if any(v is not None and abs(v) == float("inf") for v in ends):
            found.append(Finding(row.operator, "check", "infinite values: a mask, or an overflow"))
    return tuple(found)


def _absent(rows: Sequence[LayerRow], graph: ModelGraph) -> tuple[Finding, ...]:
    """Name operators without a row: a branch of the model left them out, or made them depend on constants alone."""
    seen = {row.quantizer for row in rows}
    absent = [n.name for n in graph.quantized if n.kind != OpKind.constant and n.quantizer not in seen]
    text = f"no row: not computed from this input{also(absent[1:])}"
    return (Finding(absent[0], "info", text),) if absent else ()


def filtered(table: LayerTable, prefixes: Sequence[str] = (), types: Sequence[str] = ()) -> LayerTable:
    """Rows whose name starts with one of `prefixes` or whose type is one of `types`; all rows if neither is given.

    A type is that of either model, in full or its last part. One of the two conditions is enough, as in the plugin.
    """
    if not prefixes and not types:
        return table

    def chosen(row: LayerRow) -> bool:
        return row.mod_name.startswith(tuple(prefixes)) or is_of(types, row.base_op_type, row.analy_op_type)

    return replace(table, rows=tuple(row for row in table.rows if chosen(row)))
