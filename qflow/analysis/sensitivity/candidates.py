"""Candidates: quantizers with a dtype and a scale, each a row of a sensitivity table."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from qflow.analysis.measures.tables import SensitivityRow
from qflow.core.dtype import QDtype
from qflow.core.graph import OpNode
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.captured_ops import Variant
from qflow.quant.values.fake_quant import FakeQuant

FINENESS = {QDtype.qint8: 0, QDtype.qint16: 1, QDtype.float16: 2}


@dataclass(frozen=True)
class Candidate:
    """One quantizer at one dtype, with its scale: a row of the table."""

    node: OpNode
    variant: Variant

    @property
    def sensitive_type(self) -> str:
        """`weight` or `activation`."""
        return "weight" if self.variant.weight else "activation"

    @property
    def quantizer(self) -> tuple[str, bool]:
        """Its quantizer: name, and whether it is a weight's."""
        return self.variant.quantizer.name, self.variant.weight

    def row(self, score: float, spread: float, outputs: dict[str, float], exact: bool = True) -> SensitivityRow:
        """The table's row."""
        node = self.node
        return SensitivityRow(
            op_name=node.name,
            sensitive_type=self.sensitive_type,
            op_type=node.op_type,
            score=score,
            quant_dtype=str(self.variant.quantizer.dtype),
            flops=2 * node.macs // max(node.shape[0] if node.shape else 1, 1),
            spread=spread,
            exact=exact,
            outputs=tuple(outputs.items()),
        )


def candidates(prepared: QuantizedModel, dtype: QDtype | None = None) -> list[Candidate]:
    """Every quantizer of a calibrated model that changes values, as it is now (copies: it may be changed again).

    With a `dtype`, those that have it. float16 needs no scale and is put in place of any integer output; an int8 weight
    becomes int16 with the range that it has.
    """
    graph = prepared.graph
    kept = [(n, n.quantizer, False, prepared.outputs) for n in graph.quantized]
    kept += [(n, n.weight, True, prepared.weights) for n in graph.weighted]
    found = []
    for node, name, weight, of in kept:
        quantizer = of[name] if name else None
        if quantizer is None or quantizer.dtype in (None, QDtype.float32):
            continue
        if dtype == QDtype.float16 and not weight:
            found.append(Candidate(node, Variant(quantizer.name, weight, _copy(quantizer, dtype))))
        elif dtype == QDtype.qint16 and weight and quantizer.dtype == QDtype.qint8:
            wide = _copy(quantizer, dtype)
            wide.scale.mul_(quantizer.divisor() / wide.divisor())
            found.append(Candidate(node, Variant(quantizer.name, weight, wide)))
        elif dtype in (None, quantizer.dtype):
            found.append(Candidate(node, Variant(quantizer.name, weight, _copy(quantizer, quantizer.dtype))))
    return found


def finer(rows: Sequence[Candidate], own: Sequence[Candidate]) -> list[Candidate]:
    """Those of `rows` at a finer dtype than their quantizer has in `own`, if it is there."""
    has = {row.quantizer: _fineness(row) for row in own}
    return [row for row in rows if _fineness(row) > has.get(row.quantizer, -1)]


def _fineness(row: Candidate) -> int:
    return FINENESS[QDtype(row.variant.quantizer.dtype)]


def _copy(quantizer: FakeQuant, dtype: QDtype | None) -> FakeQuant:
    found = copy.deepcopy(quantizer)
    found.dtype = dtype
    found.enabled = True
    found.averaging_constant = 0.0
    return found.eval()
