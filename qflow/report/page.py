"""The analysis as one HTML file: what to do first, then charts to point at (plotly), tables and pictures.

Everything is in the file, plotly.js too (some 5 MB): it opens without a network, and its Content-Security-Policy
lets it load nothing. Import this where a page is written: plotly takes a while to load.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from qflow.analysis.tables import (
    Advice,
    BadcaseTable,
    Finding,
    LayerRow,
    LayerTable,
    SensitivityRow,
    SensitivityTable,
)
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
"""Bars drawn at most: the most sensitive; the rest is summed up in a line."""
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
# Named one by one: what plotly offers by default may want a server.
BUTTONS = "['toImage', 'zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d']"
CONFIG = f"{{displaylogo: false, responsive: true, modeBarButtons: [{BUTTONS}]}}"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1240px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 24px; margin-bottom: 4px; } h2 { font-size: 19px; margin: 34px 0 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 10px; border-bottom: 1px solid #ddd; }
th { background: #f3f3f3; } td.name, code { font-family: ui-monospace, monospace; font-size: 13px; }
td.name, code { overflow-wrap: anywhere; }
td.figures { white-space: nowrap; } .chart { max-height: 900px; overflow-y: auto; }
.error { color: #b03a00; font-weight: 600; } .missing { color: #555; }
figure { margin: 16px 0; } img { max-width: 100%; height: auto; border: 1px solid #ddd; }
"""


def analysis_page(
    path: Path,
    title: str,
    layers: LayerTable | None,
    sensitivity: SensitivityTable | None,
    badcases: BadcaseTable | None,
    advice: Sequence[Advice],
    pictures: Mapping[str, Path],
    findings: Sequence[Finding] | None = None,
) -> None:
    """Write the page; a part that is None is left out with a sentence. `pictures` are PNG files by their caption.

    `findings` are those of the tables where none are given.
    """
    if findings is None:
        tables = (badcases, layers, sensitivity)
        findings = [finding for table in tables if table is not None for finding in table.findings]
    analysed = layers is not None or sensitivity is not None
    parts = [
        "<h2>What to do</h2>",
        _advice(advice) if advice else _missing("No advice." if analysed else "The advisor was not run."),
        "<h2>Findings</h2>",
        _findings(findings)
        if findings
        else _missing("No findings." if analysed else "Nothing was run that makes findings."),
        "<h2>Error along the network</h2>",
        _chart(network_chart(layers), "network") if layers else _missing("The layer comparison was not run."),
        "<h2>Sensitivity</h2>",
        _chart(sensitivity_chart(sensitivity), "sensitivity") if sensitivity else _missing("Sensitivity was not run."),
        "<h2>Bad cases</h2>",
        _badcases(badcases) if badcases else _missing("The search for bad cases was not run."),
    ]
    if pictures:
        parts += ["<h2>Pictures</h2>", *(_picture(caption, file) for caption, file in pictures.items())]
    path.write_text(_document(title, parts), encoding="utf-8")


def _document(title: str, parts: Sequence[str]) -> str:
    charts = any("Plotly.newPlot" in part for part in parts)
    body = "\n".join(parts)
    script = f"<script>{get_plotlyjs()}</script>" if charts else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{STYLE}</style>{script}</head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def _missing(sentence: str) -> str:
    return f'<p class="missing">{escape(sentence)}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Cells are (class, HTML that is escaped already)."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _advice(advice: Sequence[Advice]) -> str:
    rows = [
        [
            ("name", escape(item.op)),
            ("", escape(item.text)),
            ("", f"<code>{escape(item.line)}</code>" if item.line else "change the float model"),
            ("", escape(f"{item.cause} ({item.source})")),
            ("figures", "<br>".join(escape(f"{name} {value:.4g}") for name, value in item.figures)),
            ("", f"{item.gain:.1%}"),
        ]
        for item in advice
    ]
    return _table(("operator", "what to do", "line to apply", "cause", "figures", "share of sensitivity"), rows)


def _findings(findings: Sequence[Finding]) -> str:
    rows = [
        [(f.level if f.level == "error" else "", escape(f.level)), ("name", escape(f.op)), ("", escape(f.message))]
        for f in findings
    ]
    return _table(("level", "operator", "finding"), rows)


def _badcases(table: BadcaseTable) -> str:
    rows = [
        [("name", escape(output)), ("", escape(metric)), ("", str(i)), ("", _number(table.value[output][metric]))]
        for output, metrics in table.index.items()
        for metric, i in metrics.items()
    ]
    worst = ", ".join(f"{metric} {index}" for metric, index in table.worst.items())
    chosen = ", ".join(map(str, table.chosen))
    said = f"{table.samples} samples. Worst over all outputs: {worst}. Analysed by {table.metric}: {chosen}."
    return f"<p>{escape(said)}</p>" + _table(("output", "metric", "worst sample", "value"), rows)


def _picture(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    text = escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>'


def network_chart(table: LayerTable) -> go.Figure:
    """Accumulated and single-operator error of every operator; the text under the pointer has all its figures."""
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
    said = "operator (open: without a quantizer" + (f"; all names begin with {plain(prefix)})" if prefix else ")")
    figure.update_xaxes(tickvals=ticks, ticktext=names, tickangle=-90, title=said, range=[-0.7, len(rows) - 0.3])
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
    """Bars by type and dtype, most sensitive on top; the page scrolls, so that every name can be read."""
    rows = sorted(table.rows, key=lambda row: -row.score if row.score == row.score else math.inf)
    shown, rest = list(enumerate(rows[:BARS])), rows[BARS:]
    figure = go.Figure()
    for kind, dtype, exact in dict.fromkeys((row.sensitive_type, row.quant_dtype, row.exact) for _, row in shown):
        group = [(i, r) for i, r in shown if (r.sensitive_type, r.quant_dtype, r.exact) == (kind, dtype, exact)]
        figure.add_bar(
            y=[i for i, _ in group],
            x=[r.score for _, r in group],
            orientation="h",
            width=0.75,  # else plotly widens bars whose neighbours are in another trace
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
    said = f"{table.metric}, {table.merge}, {table.samples} samples; {table.method}{more}"
    figure.update_layout(barmode="overlay", bargap=0.25)
    figure.update_xaxes(title=plain(said), rangemode="tozero", side="top")
    names = [plain(shorten(row.op_name, 60)) for _, row in shown]
    figure.update_yaxes(tickvals=[i for i, _ in shown], ticktext=names, range=[len(shown) - 0.4, -0.6])
    return figure


def _whiskers(rows: Sequence[SensitivityRow]) -> dict[str, Any]:
    below = [min(r.spread, max(r.score, 0.0)) for r in rows]  # a distance ends at 0, however much it varies
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
    """Every field of a row, one a line; None is left out."""
    lines = []
    for field in fields(row):
        value = getattr(row, field.name)
        if value is None or value == "" or value == ():
            continue
        if field.name == "outputs":
            value = ", ".join(f"{output} {_number(number)}" for output, number in value)
        lines.append(f"{field.name}: {plain(_number(value) if isinstance(value, float) else str(value))}")
    return "<br>".join(lines)


def _number(value: float) -> str:
    return f"{value:.5g}"


def plain(text: str) -> str:
    """Text for plotly, which reads some HTML in labels."""
    return escape(text, quote=False)


def _chart(figure: go.Figure, name: str) -> str:
    # < and > leave the JSON as escapes: no operator's name can end the script.
    data = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    call = f"const f = {data}; Plotly.newPlot('{name}', f.data, f.layout, {CONFIG});"
    return f'<div id="{name}" class="chart"></div>\n<script>{{{call}}}</script>'
