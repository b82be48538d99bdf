"""Rows of the layer table: the columns of one operator call, from its float and its calibrated values."""

from __future__ import annotations

from torch import Tensor

from qflow.analysis.measures.layer_metrics import EMPTY, compare, relative_error
from qflow.analysis.measures.tables import Finding, LayerRow
from qflow.core.graph import OpNode
from qflow.quant.model.quantized_model import QuantizedModel


class Rows:
    """Makes the rows of one table in the order of the calls."""

    def __init__(self, prepared: QuantizedModel) -> None:
        self.prepared = prepared
        self.findings: list[Finding] = []
        self.nodes: dict[str, OpNode] = {}
        for node in prepared.graph.nodes:
            self.nodes.update(dict.fromkeys((node.name, *node.fused), node))

    def row(self, name: str, op_type: str, base: Tensor, own: Tensor | None, alone: Tensor | None) -> LayerRow:
        """Compare the float value `base` of a call with its calibrated value, and with that on float inputs alone.

        Without one of the two, its columns are empty.
        """
        if not self.findings and base.is_floating_point() and bool(base.isnan().any()):
            text = "the float model itself gives NaN here first: check the bad case and the model"
            self.findings.append(Finding(name, "error", text))
        node = self.nodes.get(name)
        ends = node is None or name in self.prepared.plan.output_at or len(node.fused) == 0
        columns = compare(base, own) if ends and own is not None else dict.fromkeys(EMPTY)
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
            single_error=relative_error(base, alone) if ends and alone is not None else None,
            **columns,  # type: ignore[arg-type]
        )


def _analysis_type(op_type: str, node: OpNode | None, ends: bool) -> str:
    """Type in the calibrated model: that of the whole group at its last member, Identity at the others."""
    if node is None or not node.fused:
        return op_type
    return group_type(node) if ends else "torch.nn.modules.linear.Identity"


def group_type(node: OpNode) -> str:
    """Type of a whole group in the calibrated model; the operator's own if nothing is fused into it."""
    kind = node.op_type.rsplit(".", 1)[-1]
    return f"qflow.{kind}{''.join(node.fused_types)}" if node.fused else node.op_type
