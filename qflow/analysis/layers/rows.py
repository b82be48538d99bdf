"""Rows of the layer table: the columns of one operator call, from its float and its calibrated values."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from qflow.analysis.measures.kl_divergence import divergence
from qflow.analysis.measures.layer_metrics import EMPTY, compare, magnitude, relative_error
from qflow.analysis.measures.tables import Finding, LayerRow
from qflow.core.graph import OpNode
from qflow.quant.model.quantized_model import QuantizedModel


class Twin(NamedTuple):
    """A row of the same values in the same memory: of what an identity passes on, or a view shows in another shape."""

    row: LayerRow
    same_shape: bool


class Rows:
    """Makes the rows of one table in the order of the calls."""

    def __init__(self, prepared: QuantizedModel) -> None:
        self.prepared = prepared
        self.findings: list[Finding] = []
        self.nodes: dict[str, OpNode] = {}
        for node in prepared.graph.nodes:
            self.nodes.update(dict.fromkeys((node.name, *node.fused), node))

    def row(
        self,
        name: str,
        op_type: str,
        base: Tensor,
        own: Tensor | None,
        alone: Tensor | None,
        twin: Twin | None = None,
    ) -> LayerRow:
        """Compare the float value `base` of a call with its calibrated value, and with that on float inputs alone.

        Without one of the two, its columns are empty. `twin` is a row of the very same values.
        """
        node = self.nodes.get(name)
        ends = node is None or name in self.prepared.plan.output_at or len(node.fused) == 0
        columns = self._columns(base, own, twin) if ends and own is not None else dict.fromkeys(EMPTY)
        if not self.findings and columns["base_model_min"] is None and _has_nan(base):
            text = "the float model itself gives NaN here first: check the bad case and the model"
            self.findings.append(Finding(name, "error", text))
        quantizer = self.prepared.outputs.get(self.prepared.plan.output_at.get(name, ""))
        active = quantizer is not None and quantizer.active
        integer = quantizer is not None and quantizer.dtype is not None and quantizer.dtype.is_integer
        scale = float(quantizer.scale) if quantizer is not None and active and integer else None
        atol = columns.get("Atol")
        return LayerRow(
            index=0,
            mod_name=name,
            base_op_type=op_type,
            analy_op_type=_analysis_type(op_type, node, ends),
            shape=tuple(base.shape),
            quant_dtype=str(quantizer.dtype) if quantizer is not None and active else "float32",
            qscale=scale,
            max_atol_diff=atol,
            max_qscale_diff=None if atol is None or not scale else atol / scale,
            quantizer=node.name if node is not None and quantizer is not None and base.is_floating_point() else "",
            single_error=_single(base, alone, twin) if ends and alone is not None else None,
            **columns,  # type: ignore[arg-type]
        )

    def _columns(self, base: Tensor, own: Tensor, twin: Twin | None) -> dict[str, float | None]:
        if twin is None or twin.row.L1 is None:
            return compare(base, own)
        known: dict[str, float | None] = {column: getattr(twin.row, column) for column in EMPTY}
        if known["KL"] is not None and not twin.same_shape:  # the other columns do not depend on the order of values
            largest = magnitude(known["base_model_min"], known["base_model_max"])
            atol = known["Atol"]
            known["KL"] = divergence(base, own, largest, atol) if atol else 0.0
        return known


def _single(base: Tensor, alone: Tensor, twin: Twin | None) -> float | None:
    known = None if twin is None else twin.row.single_error
    return relative_error(base, alone) if known is None else known


def _has_nan(x: Tensor) -> bool:
    """True if a value is NaN; its sum then is too, and takes a twentieth of the time."""
    return x.is_floating_point() and not math.isfinite(float(x.sum())) and bool(x.isnan().any())


def _analysis_type(op_type: str, node: OpNode | None, ends: bool) -> str:
    """Type in the calibrated model: that of the whole group at its last member, Identity at the others."""
    if node is None or not node.fused:
        return op_type
    return group_type(node) if ends else "torch.nn.modules.linear.Identity"


def group_type(node: OpNode) -> str:
    """Type of a whole group in the calibrated model; the operator's own if nothing is fused into it."""
    kind = node.op_type.rsplit(".", 1)[-1]
    return f"qflow.{kind}{''.join(node.fused_types)}" if node.fused else node.op_type
