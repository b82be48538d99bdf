"""The layer table as the guide prints it (`compare_per_layer_out.txt`) and as CSV."""

from __future__ import annotations

import math

from qflow.analysis.measures.tables import LayerRow, LayerTable

COLUMNS = (
    *("mod_name", "base_op_type", "analy_op_type", "shape", "quant_dtype", "qscale"),
    *("Cosine", "MSE", "L1", "KL", "SQNR", "Atol", "Rtol"),
    *("base_model_min", "analy_model_min", "base_model_max", "analy_model_max"),
    *("base_model_mean", "analy_model_mean", "base_model_var", "analy_model_var"),
    *("max_atol_diff", "max_qscale_diff"),
)
OWN = ("error", "single_error")
"""Columns that the guide does not have: accumulated error and error of the operator alone, |difference| / |float|."""


def layers_text(table: LayerTable) -> str:
    """The guide's table: an index column, numbers with 7 decimals on the right, and a frame of lines."""
    header = ["", *COLUMNS, *OWN]
    body = [[str(row.index), *(_text(row, name) for name in (*COLUMNS, *OWN))] for row in table.rows]
    widths = [max(len(cells[i]) for cells in [header, *body]) for i in range(len(header))]
    left = {1, 2, 3, 4, 5}
    between = "+".join("-" * (w + 2) for w in widths)

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    edge = f"+{between}+"
    below = [f"The error starts to grow at {table.start}."] if table.start else []
    below += [f"{way[0].upper()}{way[1:]}." for way in _way(table)]
    return "\n".join([edge, line(header), f"|{between}|", *map(line, body), edge, *below]) + "\n"


def layers_csv(table: LayerTable) -> str:
    """The plugin's CSV: cells joined by a comma and a blank, commas inside a shape written as `*`."""
    lines = [", ".join(["", *COLUMNS, *OWN])]
    for row in table.rows:
        cells = [_text(row, name).replace(",", "*") for name in (*COLUMNS, *OWN)]
        lines.append(", ".join([str(row.index), *cells]))
    return "\n".join(lines) + "\n"


def _text(row: LayerRow, name: str) -> str:
    if name == "shape":
        return f"torch.Size([{', '.join(map(str, row.shape))}])"
    value = getattr(row, name)
    if value is None:
        return ""
    if isinstance(value, float):
        return (f"{value:.7f}" if abs(value) < 1e9 else f"{value:.7g}") if math.isfinite(value) else str(value)
    return str(value)


def layers_line(table: LayerTable) -> str:
    """The table in one line for the console."""
    if _way(table):
        largest = max(table.rows, key=lambda row: row.error or 0.0)
        worst = f"largest accumulated error: {largest.operator} ({largest.error or 0.0:.2g})"
        return "; ".join([worst, *_way(table)])
    largest = max(table.rows, key=lambda row: row.single_error or 0.0)
    start = f"the error starts to grow at {table.start}; " if table.start else ""
    return f"{start}largest error of its own: {largest.operator} ({largest.single_error or 0.0:.2g})"


def _way(table: LayerTable) -> list[str]:
    """How the table was made, if not operator by operator."""
    return [finding.message for finding in table.findings if finding.op == "layers"]
