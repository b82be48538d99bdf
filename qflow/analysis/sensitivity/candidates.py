"""Candidates: the quantizers that a sensitivity table ranks, each with a dtype and a scale."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

from qflow.analysis.measures.tables import SensitivityRow
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpNode
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
    def name(self) -> str:
        """Name of the operator, or of the value inside it (`norm3.var_mean.pre_mean`)."""
        return self.variant.quantizer.name if self.inside else self.node.name

    @property
    def inside(self) -> bool:
        """True for a value inside a norm or softmax."""
        return self.variant.quantizer.name in self.node.inner

    @property
    def sensitive_type(self) -> str:
        """`weight` or `activation`."""
        return "weight" if self.variant.weight else "activation"

    @property
    def quantizer(self) -> tuple[str, bool]:
        """Name of the quantizer, and whether it quantizes a weight."""
        return self.variant.quantizer.name, self.variant.weight

    def row(self, score: float, spread: float, outputs: dict[str, float], exact: bool = True) -> SensitivityRow:
        """The table's row."""
        node = self.node
        return SensitivityRow(
            op_name=self.name,
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
    """Copies of all quantizers of a calibrated model that change values, at their present dtypes and scales.

    With a `dtype`, those that have it or can be converted to it: float16 needs no scale and replaces the dtype of any
    output; an int8 weight becomes int16 with the same range. Values inside norms and softmaxes are int16 whatever
    integer dtype is asked for.
    """
    graph = prepared.graph
    kept = [(n, name, False, prepared.outputs) for n in graph.quantized for name in (n.quantizer, *n.inner)]
    kept += [(n, n.weight, True, prepared.weights) for n in graph.weighted]
    found = []
    for node, name, weight, of in kept:
        quantizer = of[name] if name else None
        if quantizer is None or quantizer.dtype in (None, QDtype.float32):
            continue
        if dtype == QDtype.float16 and not weight:
            found.append(Candidate(node, Variant(quantizer.name, weight, _copy(quantizer, dtype))))
        elif dtype == QDtype.qint16 and weight and quantizer.dtype == QDtype.qint8:
            int16 = _copy(quantizer, dtype)
            int16.scale.mul_(quantizer.divisor() / int16.divisor())
            found.append(Candidate(node, Variant(quantizer.name, weight, int16)))
        elif dtype in (None, quantizer.dtype) or name in node.inner:
            found.append(Candidate(node, Variant(quantizer.name, weight, _copy(quantizer, quantizer.dtype))))
    return found


def finer(rows: Sequence[Candidate], own: Sequence[Candidate], known: Sequence[Candidate]) -> list[Candidate]:
    """Those of `rows` whose dtype is finer than that of the same quantizer in `own`, or whose quantizer is new.

    Rows that are `known` already are left out.
    """
    has = {row.quantizer: _fineness(row) for row in own}
    there = {(row.quantizer, _fineness(row)) for row in known}
    finer = [row for row in rows if _fineness(row) > has.get(row.quantizer, -1)]
    return [row for row in finer if (row.quantizer, _fineness(row)) not in there]


def _fineness(row: Candidate) -> int:
    return FINENESS[QDtype(row.variant.quantizer.dtype)]


def _copy(quantizer: FakeQuant, dtype: QDtype | None) -> FakeQuant:
    found = copy.deepcopy(quantizer)
    found.dtype = dtype
    found.enabled = True
    found.averaging_constant = 0.0
    return found.eval()


def sample_flops(graph: ModelGraph) -> int:
    """FLOPs of the whole model for one sample."""
    return sum(2 * node.macs // max(node.shape[0] if node.shape else 1, 1) for node in graph.weighted)
