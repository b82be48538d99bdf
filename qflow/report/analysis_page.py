"""The sections of an analysis, on a page of their own and as part of a study's report: first what to do."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qflow.analysis.measures.advice import Advice, Fidelity
from qflow.analysis.measures.tables import BadcaseTable, Finding, LayerTable, SensitivityTable, also
from qflow.report.charts import BARS, network_chart, sensitivity_chart
from qflow.report.layer_rows import by_operator
from qflow.report.page import (
    Cell,
    Section,
    cell,
    chart,
    code,
    document,
    folded,
    missing,
    number,
    paragraph,
    picture,
    table,
)
from qflow.report.words import cause_words

NO_ADVICE = "Nothing stands out: no operator is much more sensitive than the others."
LAYER_COLUMNS = [
    *("qscale", "error", "single_error", "Cosine", "SQNR", "Atol", "max_qscale_diff"),
    *("base_model_min", "base_model_max"),
]
GRAVEST = {"error": 0, "check": 1, "info": 2}


@dataclass(frozen=True)
class Analysis:
    """What an analysis found; a part that was not run is None."""

    layers: LayerTable | None = None
    sensitivity: SensitivityTable | None = None
    badcases: BadcaseTable | None = None
    advice: Sequence[Advice] | None = None
    fidelity: Fidelity | None = None
    findings: Sequence[Finding] = ()


def analysis_page(path: Path, title: str, found: Analysis, pictures: Mapping[str, Path]) -> None:
    """Write the page of one analysis. `pictures` are PNG files by their caption."""
    ran = found.layers is not None or found.sensitivity is not None
    none = "No findings." if ran else "No step that gives findings was run."
    sections = [
        Section("What to do", advice_part(found.advice, found.fidelity)),
        Section("Findings", findings_part(found.findings, none)),
        Section("Error along the network", layers_part(found.layers)),
        Section("Sensitivity", sensitivity_part(found.sensitivity)),
        Section("Bad cases", badcases_part(found.badcases)),
    ]
    if pictures:
        shown = "".join(picture(caption, file) for caption, file in pictures.items())
        sections.append(Section("Pictures", shown))
    path.write_text(document(title, _subtitle(found), sections), encoding="utf-8")


def _subtitle(found: Analysis) -> str:
    parts = []
    if found.layers is not None:
        parts.append(f"{len(found.layers.rows)} operator calls")
    if found.badcases is not None:
        parts.append(f"the {len(found.badcases.chosen)} worst of {found.badcases.samples} samples")
    return ", ".join(["Analysis against the float model", *parts])


def advice_part(advice: Sequence[Advice] | None, fidelity: Fidelity | None = None) -> str:
    """The advice with its overrides, and the effect of following it."""
    if not advice:
        return missing(NO_ADVICE if advice is not None else "The advisor was not run.")
    rows = [
        [
            ("name", escape(item.op)),
            ("wide", f'{escape(item.text)}<span class="quiet">{escape(_figures(item))}</span>'),
            ("wide", code(shlex.quote(item.line))) if item.line else cell("none"),
            cell(f"{cause_words(item.cause)} ({item.source})"),
            ("number", f"{item.gain:.1%}"),
        ]
        for item in advice
    ]
    header = ("operator", "what to do", "override", "cause", "share of sensitivity")
    return table(header, rows) + (_fidelity(fidelity) if fidelity else "")


def _figures(item: Advice) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in item.figures)


def _fidelity(fidelity: Fidelity) -> str:
    change = f"{number(fidelity.before)} to {number(fidelity.after)} ({fidelity.metric}, all quantizers on)"
    rows = [
        [
            ("name", escape(row.op_name)),
            cell(row.sensitive_type),
            cell(" to ".join(dict.fromkeys((row.before_dtype, row.after_dtype)))),
            cell(row.before),
            cell(row.after),
        ]
        for row in fidelity.rows
    ]
    parts = ["<h3>The effect of following it</h3>", paragraph(f"The outputs' distance to float changes from {change}.")]
    parts += [f"<p>All together: {code(shlex.quote(fidelity.line))}</p>"] if fidelity.line else []
    parts += [table(("operator", "quantizer", "dtype", "sensitivity before", "after"), rows)] if rows else []
    return "".join([*parts, *map(missing, fidelity.left_out)])


def findings_part(findings: Sequence[Finding], none: str = "No findings.") -> str:
    """The findings, the gravest first; equal ones are one row that names all their operators."""
    groups: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.message), []).append(finding.op)
    ordered = sorted(groups.items(), key=lambda entry: GRAVEST.get(entry[0][0], 3))
    rows = [
        [cell(level, "bad" if level == "error" else ""), cell(ops[0], "name"), cell(message + also(ops[1:]), "wide")]
        for (level, message), ops in ordered
    ]
    return table(("level", "operator", "finding"), rows) if rows else missing(none)


def layers_part(layers: LayerTable | None) -> str:
    """The error of every operator as a chart, and its table."""
    if layers is None:
        return missing("The layer comparison was not run.")
    rows: list[list[Cell]] = []
    shown, members = by_operator(layers)
    for row in shown.rows:
        kind = row.analy_op_type.rsplit(".", 1)[-1]
        own = [cell(kind), cell(" x ".join(map(str, row.shape))), cell(row.quant_dtype)]
        rows.append(
            [
                cell(row.index),
                cell(row.mod_name, "name"),
                cell(members.get(row.index, "")),
                *own,
                *(cell(getattr(row, n)) for n in LAYER_COLUMNS),
            ]
        )
    header = ("index", "operator", "fused with", "type", "shape", "quant_dtype", *LAYER_COLUMNS)
    summary = f"The {len(rows)} operators, in order; compare_per_layer_out.csv has every call and column"
    return chart(network_chart(layers)) + folded(summary, table(header, rows))


def sensitivity_part(found: SensitivityTable | None) -> str:
    """The most sensitive quantizers as bars, and the table of all."""
    if found is None:
        return missing("Sensitivity was not run.")
    about = f"{found.metric}, {found.merge}, {found.samples} samples; {found.method}. Larger is more sensitive."
    count = len({(row.op_name, row.sensitive_type) for row in found.rows})
    more = f" The chart shows the first {BARS} of {count} quantizers." if count > BARS else ""
    rows = [
        [
            cell(r.op_name, "name"), cell(r.sensitive_type), cell(r.quant_dtype), cell(r.score), cell(r.spread),
            cell("yes" if r.exact else "estimate"),
        ]
        for r in found.rows
    ]  # fmt: skip
    listed = table(("operator", "quantizer", "dtype", "score", "spread over bad cases", "measured"), rows)
    return (
        paragraph(about + more)
        + chart(sensitivity_chart(found))
        + folded(f"All {len(rows)} rows, the most sensitive first", listed)
    )


def badcases_part(found: BadcaseTable | None, pictures: Mapping[str, Path] | None = None) -> str:
    """The worst samples of each output, and their pictures."""
    if found is None:
        return missing("The search for bad cases was not run.")
    rows = [
        [cell(output, "name"), cell(metric), cell(found.shown(i), "number"), cell(found.value[output][metric])]
        for output, metrics in found.index.items()
        for metric, i in metrics.items()
    ]
    worst = ", ".join(f"{metric} {found.shown(index)}" for metric, index in found.worst.items())
    chosen = ", ".join(map(found.shown, found.chosen))
    text = f"{found.samples} samples. Worst over all outputs: {worst}. Analysed by {found.metric}: {chosen}."
    shown = "".join(picture(caption, file) for caption, file in (pictures or {}).items())
    return paragraph(text) + shown + table(("output", "metric", "worst sample", "value"), rows)
