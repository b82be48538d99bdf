"""The charts of an analysis as plain data, which assets/charts.js draws: error along the network, sensitivity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from qflow.analysis.measures.tables import LayerRow, LayerTable, SensitivityRow, SensitivityTable
from qflow.report.drawing import common_prefix, log_points, log_range, shorten, start_position
from qflow.report.layer_rows import by_operator
from qflow.report.page import number

BARS = 40
"""Most bars drawn, those of the most sensitive quantizers; a table has all of them."""
COLORS = {"activation": "c0", "weight": "c3"}
LETTERS = 28  # of a name below an axis


def network_chart(table: LayerTable) -> dict[str, Any]:
    """Accumulated and single-operator error of every operator; the text of a point has all values of its row."""
    table, _ = by_operator(table)
    rows = table.rows
    low, high = log_range([value for row in rows for value in (row.error, row.single_error)])
    series: list[dict[str, Any]] = []
    for label, color, mark, values in (
        ("accumulated error", "c0", "dot", [row.error for row in rows]),
        ("error of the operator alone", "c1", "diamond", [row.single_error for row in rows]),
    ):
        points = [(x, y, row_text(rows[x])) for x, y in log_points(values, low, high)]
        quantized = [p for p in points if rows[p[0]].quantizer]
        others = [p for p in points if not rows[p[0]].quantizer]
        if mark == "dot":
            series.append(
                {"name": "", "color": color, "line": "straight", "points": [[x, y, ""] for x, y, _ in points]}
            )
        size = 4.5 if len(rows) <= 120 else 3
        series.append({"name": label, "color": color, "mark": mark, "size": size, "points": quantized})
        if others:
            name = f"{label}, without a quantizer"
            series.append({"name": name, "color": color, "mark": mark, "size": size, "open": True, "points": others})
    start = start_position(table)
    prefix = common_prefix([row.mod_name for row in rows])
    names = [shorten(row.mod_name[len(prefix) :], LETTERS) for row in rows]
    title = f"operator, in order{f'; all names begin with {prefix}' if prefix else ''}"
    rules = [] if start is None else [{"axis": "x", "at": start, "color": "c2", "text": _start(table)}]
    return {
        "kind": "xy",
        "label": f"Error along the network of {len(rows)} operators",
        "height": 520,
        "x": {"low": -0.7, "high": max(len(rows) - 0.3, 0.7), "title": title, "names": names,
              "room": 26 + 6.6 * max(map(len, names), default=1)},
        "y": {"low": low / 1.4, "high": high * 1.4, "log": True, "title": "relative error"},
        "rules": rules,
        "series": series,
    }  # fmt: skip


def _start(table: LayerTable) -> str:
    return f"error starts to grow: {shorten(table.start, 40)}"


def sensitivity_chart(table: SensitivityTable) -> dict[str, Any]:
    """A bar for each quantizer at its lowest dtype, the most sensitive on top; labels name the other dtypes too."""
    groups: dict[tuple[str, str], list[SensitivityRow]] = {}
    for row in table.by_quantizer():
        groups.setdefault((row.op_name, row.sensitive_type), []).append(row)
    shown = list(groups.values())[:BARS]
    first = [rows[0] for rows in shown]
    ends = [row.score + row.spread for row in first if math.isfinite(row.score + row.spread)]
    bars = [
        {
            "name": row.op_name, "value": row.score, "spread": row.spread if math.isfinite(row.spread) else 0.0,
            "color": COLORS.get(row.sensitive_type, "c5"), "open": not row.exact,
            "label": ", ".join(f"{r.score:.3g} {r.quant_dtype}" for r in rows), "text": "\n".join(map(row_text, rows)),
        }
        for row, rows in zip(first, shown, strict=True)
    ]  # fmt: skip
    kinds = [k for k in COLORS if any(row.sensitive_type == k for row in first)]
    legend: list[dict[str, Any]] = [{"name": kind, "color": COLORS[kind], "mark": "square"} for kind in kinds]
    if not all(row.exact for row in first):
        legend.append({"name": "estimated", "color": "c5", "mark": "square", "open": True})
    return {
        "kind": "bars",
        "label": f"Sensitivity of {len(shown)} of {len(groups)} quantizers",
        "names": name_room([row.op_name for row in first]),
        "high": max(ends, default=0.0),
        "legend": legend,
        "rows": bars,
    }


def name_room(names: Sequence[str]) -> int:
    """Pixels for the names beside bars."""
    return 16 + round(6.8 * max(map(len, names), default=1))


def row_text(row: LayerRow | SensitivityRow) -> str:
    """Every field of a row, one per line; what is None or empty is left out."""
    lines = []
    for field in fields(row):
        value = getattr(row, field.name)
        if value is None or value == "" or value == ():
            continue
        if field.name == "outputs":
            value = ", ".join(f"{output} {number(score)}" for output, score in value)
        lines.append(f"{field.name}: {number(value) if isinstance(value, float) else value}")
    return "\n".join(lines)
