"""Writes sensitivity tables in the plugin's files: `output_<name>_<metric>_sensitive_ops.txt` and `.pt`.

The `.pt` holds builtin types only (the plugin pickles its own classes): rows of op_name, sensitive_type, op_type,
value, quant_dtype, flops, most sensitive first, in the form that the plugin's setters read.
"""

from __future__ import annotations

from pathlib import Path

import torch

from qflow.analysis.measures.metrics import smallest_is_worst
from qflow.analysis.measures.tables import SensitivityRow, SensitivityTable, text_table

Row = list[object]


def output_rows(table: SensitivityTable, output: str) -> list[Row]:
    """Rows for one output under the plain metric, most sensitive first (smallest first for Cosine and SQNR)."""
    total = table.flops or 1
    found = [(row, dict(row.outputs)[output]) for row in table.rows if output in dict(row.outputs)]
    found.sort(key=lambda pair: pair[1], reverse=not smallest_is_worst(table.metric))
    return [_row(row, value, total) for row, value in found]


def merged_rows(table: SensitivityTable) -> list[Row]:
    """Rows by the merged score."""
    total = table.flops or 1
    return [_row(row, row.score, total) for row in table.rows]


def _row(row: SensitivityRow, value: float, total: int) -> Row:
    flops = f"{row.flops}({100 * row.flops / total:.2f}%)"
    return [row.op_name, row.sensitive_type, row.op_type, value, row.quant_dtype, flops]


def write_sensitive_ops(table: SensitivityTable, folder: Path) -> list[Path]:
    """Write both files of every output, and of the merged table under the output name `merged`; returns their paths."""
    names = dict.fromkeys(name for row in table.rows for name, _ in row.outputs)
    merged = "merged" if "merged" not in names else "merged_outputs"
    tables = [(merged, table.score_name, merged_rows(table))]
    tables += [(name, table.metric, output_rows(table, name)) for name in names]
    written = []
    taken: set[str] = set()
    for output, column, rows in tables:
        name = output.replace("/", "_")
        name = name if name not in taken else f"{name}_{len(taken)}"
        taken.add(name)
        path = folder / f"output_{name}_{table.metric}_sensitive_ops.pt"
        torch.save(rows, path)
        header = ["op_name", "sensitive_type", "op_type", column, "quant_dtype", "flops"]
        body = [[f"{c:.6g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
        path.with_suffix(".txt").write_text(text_table(header, body))
        written += [path, path.with_suffix(".txt")]
    return written
