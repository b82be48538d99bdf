"""The analysis as one HTML file: first what to do, then interactive charts (plotly), tables and pictures.

Everything is in the file, also plotly.js (about 5 MB): it opens without a network, and its Content-Security-Policy
does not let it load anything. Import this module only where a page is written: plotly takes a while to load.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from qflow.analysis.measures.advice import Advice, Fidelity
from qflow.analysis.measures.tables import BadcaseTable, Finding, LayerTable, SensitivityTable
from qflow.report.charts import network_chart, number, sensitivity_chart

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
# The buttons are listed one by one, because some of plotly's default buttons need a server.
BUTTONS = "['toImage', 'zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d']"
CONFIG = f"{{displaylogo: false, responsive: true, modeBarButtons: [{BUTTONS}]}}"
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1240px; margin: 24px auto; padding: 0 20px; }
h1 { font-size: 24px; margin-bottom: 4px; } h2 { font-size: 19px; margin: 34px 0 8px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; vertical-align: top; padding: 6px 10px; border-bottom: 1px solid #ddd; }
th { background: #f3f3f3; } td.name, code { font-family: ui-monospace, monospace; font-size: 13px; }
td.name, code { overflow-wrap: anywhere; }
td.values { white-space: nowrap; } .chart { max-height: 900px; overflow-y: auto; }
.error { color: #b03a00; font-weight: 600; } .missing { color: #555; }
details td, details td.name { white-space: nowrap; padding: 3px 10px; } summary { cursor: pointer; margin: 8px 0; }
figure { margin: 16px 0; } img { max-width: 100%; height: auto; border: 1px solid #ddd; }
"""


NO_LAYERS = "The layer comparison was not run."
NO_ADVICE = "Nothing stands out: no operator is much more sensitive than the others."


def analysis_page(
    path: Path,
    title: str,
    layers: LayerTable | None,
    sensitivity: SensitivityTable | None,
    badcases: BadcaseTable | None,
    advice: Sequence[Advice] | None,
    pictures: Mapping[str, Path],
    findings: Sequence[Finding] | None = None,
    fidelity: Fidelity | None = None,
) -> None:
    """Write the page; a sentence replaces each part that is None. `pictures` are PNG files by their caption.

    Without `findings` those of the tables are shown.
    """
    if findings is None:
        tables = (badcases, layers, sensitivity)
        findings = [finding for table in tables if table is not None for finding in table.findings]
    analysed = layers is not None or sensitivity is not None
    parts = [
        "<h2>What to do</h2>",
        _advice(advice) if advice else _missing(NO_ADVICE if advice is not None else "The advisor was not run."),
        *(["<h2>The effect of following it</h2>", _fidelity(fidelity)] if fidelity else []),
        "<h2>Findings</h2>",
        _findings(findings)
        if findings
        else _missing("No findings." if analysed else "No step that gives findings was run."),
        "<h2>Error along the network</h2>",
        *([_chart(network_chart(layers), "network"), _layers(layers)] if layers else [_missing(NO_LAYERS)]),
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
    """HTML of a table; cells are (class, HTML that is escaped already)."""
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
            ("", _override(item.line) if item.line else "none"),
            ("", escape(f"{item.cause} ({item.source})")),
            ("values", "<br>".join(escape(f"{name} {value:.4g}") for name, value in item.figures)),
            ("", f"{item.gain:.1%}"),
        ]
        for item in advice
    ]
    return _table(("operator", "what to do", "override", "cause", "measured values", "share of sensitivity"), rows)


def _override(line: str) -> str:
    """An override, quoted for a shell."""
    return f"<code>{escape(shlex.quote(line))}</code>"


def _fidelity(fidelity: Fidelity) -> str:
    change = f"{number(fidelity.before)} to {number(fidelity.after)} ({fidelity.metric}, all quantizers on)"
    rows = [
        [
            ("name", escape(row.op_name)),
            ("", escape(row.sensitive_type)),
            ("", escape(" to ".join(dict.fromkeys((row.before_dtype, row.after_dtype))))),
            ("", number(row.before)),
            ("", number(row.after)),
        ]
        for row in fidelity.rows
    ]
    table = _table(("operator", "quantizer", "dtype", "sensitivity before", "after"), rows) if rows else ""
    line = f"<p>All together: {_override(fidelity.line)}</p>" if fidelity.line else ""
    text = f"<p>The outputs' distance to float changes from {escape(change)}.</p>"
    return text + line + table + "".join(map(_missing, fidelity.left_out))


LAYER_COLUMNS = [
    *("qscale", "error", "single_error", "Cosine", "SQNR", "Atol", "max_qscale_diff"),
    *("base_model_min", "base_model_max"),
]


def _layers(table: LayerTable) -> str:
    rows = []
    for row in table.rows:
        values = [getattr(row, name) for name in LAYER_COLUMNS]
        texts = [row.analy_op_type.rsplit(".", 1)[-1], " x ".join(map(str, row.shape)), row.quant_dtype]
        texts += ["" if value is None else number(value) for value in values]
        rows.append([("", str(row.index)), ("name", escape(row.mod_name)), *(("", escape(text)) for text in texts)])
    header = ("index", "mod_name", "type", "shape", "quant_dtype", *LAYER_COLUMNS)
    summary = f"The {len(rows)} operator calls of the float model, in order; compare_per_layer_out.csv has every column"
    return f"<details><summary>{summary}</summary>{_table(header, rows)}</details>"


def _findings(findings: Sequence[Finding]) -> str:
    rows = [
        [(f.level if f.level == "error" else "", escape(f.level)), ("name", escape(f.op)), ("", escape(f.message))]
        for f in findings
    ]
    return _table(("level", "operator", "finding"), rows)


def _badcases(table: BadcaseTable) -> str:
    shown = table.shown
    rows = [
        [("name", escape(output)), ("", escape(metric)), ("", shown(i)), ("", number(table.value[output][metric]))]
        for output, metrics in table.index.items()
        for metric, i in metrics.items()
    ]
    worst = ", ".join(f"{metric} {table.shown(index)}" for metric, index in table.worst.items())
    chosen = ", ".join(map(table.shown, table.chosen))
    text = f"{table.samples} samples. Worst over all outputs: {worst}. Analysed by {table.metric}: {chosen}."
    return f"<p>{escape(text)}</p>" + _table(("output", "metric", "worst sample", "value"), rows)


def _picture(caption: str, file: Path) -> str:
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    text = escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>'


def _chart(figure: go.Figure, name: str) -> str:
    # < and > are escaped in the JSON, so that no operator's name can end the script.
    data = figure.to_json().replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    call = f"const f = {data}; Plotly.newPlot('{name}', f.data, f.layout, {CONFIG});"
    return f'<div id="{name}" class="chart"></div>\n<script>{{{call}}}</script>'
