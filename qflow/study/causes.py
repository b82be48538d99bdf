"""Why all-int16 misses the goal, from sensitivities of all-int16 itself (guide: dual int16 needed, or not needed).

A cause is named only on evidence: a row stands out if its score is beyond its own noise and at least `SHARE` of the
largest. Dual int16 is suspected where an int8 weight stands out and the tensor that it is multiplied with does too at
int8, because on a device without int16 x int16 an int16 weight takes int8 input.
"""

from __future__ import annotations

import math

from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable
from qflow.core.qconfig import QConfig
from qflow.trial.evaluator import Evaluator

SHARE = 0.1  # a row below this share of the largest row does not explain a miss
TOP = 3  # how many operators a reason names


def int16_miss_reason(evaluator: Evaluator, table: SensitivityTable, applied: QConfig, at8: SensitivityTable) -> str:
    """Return why the all-int16 model `applied` loses accuracy.

    `table` holds the sensitivities of that model on its own bad cases, `at8` those of all-int8. The cause is an
    operator that the device keeps at int8, outputs that are too coarse at int16, or int8 weights.
    """
    rows = [row for row in table.rows if row.quant_dtype != "float16" and not _finer(row, applied)]
    largest = max((row.score for row in rows if not math.isnan(row.score)), default=0.0)
    high = [row for row in rows if stands_out(row, largest, table.samples)]
    if not high:
        return "no operator stands out alone in the sensitivities of all-int16: the errors add up"
    first = max(high, key=lambda row: row.score)
    if first.sensitive_type == "weight":
        return _weights(evaluator, high, at8)
    if first.quant_dtype == "qint8":
        held = applied.ops[first.op_name].fallback.removeprefix("no int16: ")
        return f"{first.op_name} stays int8 (activation {first.score:.3g}): {held or 'its precision is pinned'}"
    coarse = [row for row in high if row.sensitive_type == "activation" and row.quant_dtype == "qint16"]
    return "int16 itself is too coarse on " + _named(coarse)


def stands_out(row: SensitivityRow, largest: float, samples: int) -> bool:
    """Return whether a row explains a miss: beyond two standard errors, and at least `SHARE` of the largest row."""
    noise = 2.0 * row.spread / math.sqrt(max(samples, 1))
    return row.score > noise and row.score >= SHARE * largest


def _finer(row: SensitivityRow, applied: QConfig) -> bool:
    """Return whether a row was measured at another dtype than the operator has in `applied`."""
    op = applied.ops.get(row.op_name)
    if op is None:  # a value inside a norm or softmax: int16 whatever the dtype of the operator
        return False
    return row.quant_dtype != str(op.weight if row.sensitive_type == "weight" else op.output)


def _weights(evaluator: Evaluator, high: list[SensitivityRow], at8: SensitivityTable) -> str:
    """Return which int8 weights lose accuracy, and for which of them int8 input would lose it too."""
    weights = sorted((row for row in high if row.sensitive_type == "weight"), key=lambda row: -row.score)
    inputs8 = {r.op_name: r for r in at8.rows if (r.sensitive_type, r.quant_dtype) == ("activation", "qint8")}
    largest = max((row.score for row in inputs8.values() if not math.isnan(row.score)), default=0.0)
    dual = []
    for row in weights:
        node = next(n for n in evaluator.graph.nodes if n.weight is not None and row.op_name in (n.name, n.weight))
        inputs = [inputs8[name] for at in node.inputs[:1] for name in evaluator.graph.source(at) if name in inputs8]
        worst = max(inputs, key=lambda row: row.score, default=None)
        if worst is not None and stands_out(worst, largest, at8.samples) and not evaluator.rules.dual(node):
            dual.append(f"{row.op_name} (weight {row.score:.3g}, its input {worst.op_name} {worst.score:.3g} at int8)")
    if dual:
        remedy = "" if evaluator.default_repair.steps else "; a repair equalizes such layers (repair=basic)"
        return f"dual int16 suspected on {', '.join(dual[:TOP])}{remedy}"
    unknown = "" if inputs8 else "; whether their inputs need int16 too is not known: sensitivity.dtypes has no qint8"
    return f"int8 weights are too coarse: {_named(weights)}{unknown}"


def _named(rows: list[SensitivityRow]) -> str:
    top = sorted(rows, key=lambda row: -row.score)[:TOP]
    return ", ".join(f"{row.op_name} ({row.score:.3g})" for row in top)
