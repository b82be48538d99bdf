"""Interactive charts of the analysis (plotly). Import this only where a page is written: plotly loads slowly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from typing import Any

import plotly.graph_objects as go

from qflow.analysis.measures.tables import LayerRow, LayerTable, SensitivityRow, SensitivityTable
from qflow.report.drawing import (
    BLUE,
    GREEN,
    RED,
    bar_color,
    common_prefix,
    log_points,
    log_range,
    shorten,
    start_position,
)

PATTERNS = {"qint8": "", "qint16": "/", "float16": "."}
BARS = 200
"""Most bars drawn, those of the most sensitive quantizers; a line sums up the rest."""


def network_chart(table: LayerTable) -> go.Figure:
    """Accumulated and single-operator error of every operator; the hover text has all values of its row."""
    rows = table.rows
    low, high = log_range([value for row in rows for value in (row.error, row.single_error)])
    hover = [hover_text(row) for row in rows]
    figure = go.Figure()
    for label, color, symbol, mode, values in (
        ("accumulated error", BLUE, "circle", "lines+markers", [row.error for row in rows]),
        ("error of the operator alone", RED, "diamond", "markers", [row.single_error for row in rows]),
    ):
        points = log_points(values, low, high)
        filled = [symbol if rows[x].quantizer else f"{symbol}-open" for x, _ in points]
        figure.add_scatter(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mode=mode,
            name=label,
            line={"color": color, "width": 1.5},
            marker={"color": color, "symbol": filled, "size": 7},
            text=[hover[x] for x, _ in points],
            hovertemplate="%{text}<extra></extra>",
        )
    _layout(figure, 560, above=70)
    _start_line(figure, table)
    figure.update_yaxes(type="log", title="relative error", exponentformat="power")
    ticks = list(range(0, len(rows), math.ceil(len(rows) / 40))) if rows else []
    prefix = common_prefix([row.mod_name for row in rows])
    names = [plain(shorten(rows[i].mod_name[len(prefix) :], 32)) for i in ticks]
    title = "operator (open: without a quantizer" + (f"; all names begin with {plain(prefix)})" if prefix else ")")
    figure.update_xaxes(tickvals=ticks, ticktext=names, tickangle=-90, title=title, range=[-0.7, len(rows) - 0.3])
    return figure


def _start_line(figure: go.Figure, table: LayerTable) -> None:
    start = start_position(table)
    if start is None:
        return
    figure.add_vline(x=start, line={"color": GREEN, "dash": "dash"})
    figure.add_annotation(
        x=start,
        y=1.0,
        yref="paper",
        yanchor="bottom",
        xanchor="left" if start < len(table.rows) / 2 else "right",
        text=f"error starts to grow: {plain(shorten(table.start, 60))}",
        showarrow=False,
        font={"color": GREEN},
    )


def sensitivity_chart(table: SensitivityTable) -> go.Figure:
    """Bars by type and dtype, most sensitive quantizers on top, high enough that every name is readable."""
    rows = table.by_quantizer()
    shown, rest = list(enumerate(rows[:BARS])), rows[BARS:]
    figure = go.Figure()
    for kind, dtype, exact in dict.fromkeys((row.sensitive_type, row.quant_dtype, row.exact) for _, row in shown):
        group = [(i, r) for i, r in shown if (r.sensitive_type, r.quant_dtype, r.exact) == (kind, dtype, exact)]
        figure.add_bar(
            y=[i for i, _ in group],
            x=[r.score for _, r in group],
            orientation="h",
            width=0.75,  # otherwise plotly widens bars whose neighbours are in another trace
            name=plain(f"{kind} {dtype}" + ("" if exact else ", estimated")),
            marker={
                "color": bar_color(kind, exact),
                "pattern": {"shape": PATTERNS.get(dtype, "x"), "fgcolor": "#222222", "fillmode": "overlay"},
            },
            error_x=_whiskers([r for _, r in group]),
            text=[hover_text(r) for _, r in group],
            textposition="none",
            hovertemplate="%{text}<extra></extra>",
        )
    _layout(figure, 210 + 19 * max(len(shown), 3), above=110)
    more = f"; not shown: {len(rest)} of {len(rows)} rows, summing to {sum(r.score for r in rest):.3g}" if rest else ""
    title = f"{table.metric}, {table.merge}, {table.samples} samples; {table.method}{more}"
    figure.update_layout(barmode="overlay", bargap=0.25)
    figure.update_xaxes(title=plain(title), rangemode="tozero", side="top")
    names = [plain(shorten(row.op_name, 60)) for _, row in shown]
    figure.update_yaxes(tickvals=[i for i, _ in shown], ticktext=names, range=[len(shown) - 0.4, -0.6])
    return figure


def _whiskers(rows: Sequence[SensitivityRow]) -> dict[str, Any]:
    below = [min(r.spread, max(r.score, 0.0)) for r in rows]  # a distance is never below 0
    return {"array": [r.spread for r in rows], "arrayminus": below, "thickness": 1, "width": 3, "color": "black"}


def _layout(figure: go.Figure, height: int, above: int) -> None:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"t": above, "r": 20, "b": 20},
        hovermode="closest",
        font={"color": "#1a1a1a"},
        legend={"orientation": "h", "yref": "container", "y": 0.99, "yanchor": "top", "x": 0.0, "xanchor": "left"},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"size": 12, "color": "#1a1a1a"}},
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True, ticks="outside")


def hover_text(row: LayerRow | SensitivityRow) -> str:
    """Every field of a row, one per line; None is left out."""
    lines = []
    for field in fields(row):
        value = getattr(row, field.name)
        if value is None or value == "" or value == ():
            continue
        if field.name == "outputs":
            value = ", ".join(f"{output} {number(score)}" for output, score in value)
        lines.append(f"{field.name}: {plain(number(value) if isinstance(value, float) else str(value))}")
    return "<br>".join(lines)


def number(value: float) -> str:
    """`value` with five digits."""
    return f"{value:.5g}"


def plain(text: str) -> str:
    """`text` escaped for plotly, which interprets some HTML in labels."""
    return escape(text, quote=False)
