"""The report of a study: what was asked and decided, the front, its health, the mix and why, cost and errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from qflow.core.agreement import meaning
from qflow.core.dtype import QDtype
from qflow.core.names import trial_name
from qflow.report import analysis_page as analysis
from qflow.report import study_charts as charts
from qflow.report.network_picture import dtype_of, network_picture
from qflow.report.page import (
    Cell,
    Section,
    cell,
    chart,
    code,
    document,
    folded,
    link,
    missing,
    number,
    paragraph,
    table,
)
from qflow.report.repair_part import repair_part
from qflow.report.study_record import Mix, StudyRecord
from qflow.report.words import cause_words, is_followed, label_words, rule_words
from qflow.search.health import FINE, LOOK, health
from qflow.search.objective import meets
from qflow.search.outcome import FinishedTrial

STATES = {FINE: ("good", "fine"), LOOK: ("bad", "look")}
WORDS = {"float16": "fp16", "qint16": "int16", "weight": "int16 weight"}
RAISED = (QDtype.float16, QDtype.qint16)
OF_INT8 = "This is of the model with all operators at int8, from which the search began, not of the shown mix."
NOT_RECORDED = "The study's run does not hold it: it was written by an earlier qflow, or the study ended before."
TOTALS = {
    "predicted latency (ms)": "cost/latency_ms",
    "time on the BPU (ms)": "cost/bpu_ms",
    "frames/s, saturated": "cost/fps",
    "share of MACs with int16": "cost/int16_mac_share",
    "weights (MB)": "cost/weight_mb",
    "traffic (MB a frame)": "cost/traffic_mb",
    "int16 operators": "qconfig/n_int16",
    "int16 weights": "qconfig/n_int16_weights",
    "fp16 operators": "qconfig/n_float16",
}


def study_page(record: StudyRecord) -> str:
    """Return the whole report."""
    trials = record.searched.trials
    state = "" if record.ended else " (the study has not ended)"
    subtitle = f"Study report: {len(trials)} trials{state}. Goal: {record.searched.goal}."
    sections = [
        Section("Result", _result(record)),
        Section("Asked and decided", _decided(record)),
        Section("Pareto front", _front(record)),
        Section("Path of the search", _path(record)),
        Section("Health of the study", _health(record)),
        Section("Importance of the parameters", _importances(record)),
        Section("The network", _network(record)),
        Section("What is not int8, and why", _raised(record)),
        *([Section("Repair", repair_part(record.repair))] if record.repair else []),
        Section("Cost", _cost(record)),
        *([Section("Training", _training(record))] if record.training else []),
        Section("What to do next", _advice(record)),
        Section("Error along the network", paragraph(OF_INT8) + analysis.layers_part(record.analysis.layers)),
        Section("Sensitivity", paragraph(OF_INT8) + analysis.sensitivity_part(record.analysis.sensitivity)),
        Section("Bad cases", _badcases(record)),
        Section("Model check", _check(record)),
    ]
    return document(record.name, subtitle, sections)


def _result(record: StudyRecord) -> str:
    study = record.searched
    if not study.trials:
        return missing("No trial finished.") + _commands(record)
    rows = [[cell("float"), cell(""), cell(f"{study.float_metric:.4f}", "number"), *[cell("", "number")] * 4]]
    for label, trial in study.baselines.items():
        rows.append(_summary_row(record, label, trial))
    if study.shown is not None:
        rows.append(_summary_row(record, "best mix" if study.best else "nearest miss", study.shown))
    name = study.accuracy.split("/", 1)[1]
    header = ("", "trial", name, "drop", "latency (ms)", "interval", "int16 ratio")
    verdict = f'<div class="verdict">{escape(record.verdict)}</div>' if record.verdict else ""
    said = paragraph(f"{text}.") if (text := meaning(name)) else ""
    return table(header, rows) + said + verdict + _commands(record)


def _summary_row(record: StudyRecord, label: str, trial: FinishedTrial) -> list[Cell]:
    m = trial.outcome.metrics
    interval = f"[{m.get(charts.LOW, math.nan):.2f}, {m.get(charts.HIGH, math.nan):.2f}]"
    return [
        cell(label, "good" if meets(trial) else ""),
        ("number", link(str(trial.number), record.run_address(trial))),
        cell(f"{m[record.searched.accuracy]:.4f}", "number"),
        cell(f"{m[charts.DROP]:+.4f}", "number"),
        cell(f"{m.get(charts.LATENCY, math.nan):.3f}", "number"),
        cell(interval if charts.LOW in m else "", "number"),
        cell(f"{m.get('qconfig/int16_ratio', math.nan):.2f}", "number"),
    ]


def _commands(record: StudyRecord) -> str:
    return "".join(f"<p>{escape(what)}: {code(line)}</p>" for what, line in record.commands)


def _decided(record: StudyRecord) -> str:
    asked = table(("asked", ""), [[cell(what), cell(words, "wide")] for what, words in record.asked])
    if not record.decisions:
        return asked + missing("No decision is recorded.")
    steps = "".join(f"<li><b>{escape(stage)}</b>: {escape(text)}</li>" for stage, text in record.decisions)
    return f"{asked}<h3>Decided, in this order</h3><ol>{steps}</ol>"


def _front(record: StudyRecord) -> str:
    by_hand = record.searched.by_hand
    if not record.searched.trials and not by_hand:
        return missing("No trial finished.")
    front = sorted(charts.front_of(record), key=lambda t: t.outcome.metrics.get(charts.LATENCY, 0.0))
    words = (
        "Each mark is a trial; a click opens its run in MLflow, if `mlflow ui` runs at that address. Lines beside the "
        "best and the baselines are the intervals of their predicted latency; where one leaves the picture, it goes on."
    )
    return (
        paragraph(words)
        + chart(charts.front_chart(record))
        + folded(f"The {len(front)} trials of the front", _trials(record, front))
        + (folded(f"{len(by_hand)} by hand, no result of the search", _trials(record, by_hand)) if by_hand else "")
    )


def _trials(record: StudyRecord, trials: Sequence[FinishedTrial]) -> str:
    name, keys = record.searched.accuracy, list(record.searched.space)
    rows = [
        [
            ("number", link(str(t.number) if t.number >= 0 else trial_name(t.number, t.label), record.run_address(t))),
            cell(label_words(t.label)),
            cell(t.outcome.metrics[name]), cell(t.outcome.metrics[charts.DROP]),
            cell(t.outcome.metrics.get(charts.LATENCY)), cell(t.outcome.metrics.get("qconfig/n_int16")),
            cell("meets", "good") if meets(t) else cell("misses"),
            *(cell("" if t.params.get(key) is None else str(t.params[key])) for key in keys),
        ]
        for t in trials
    ]  # fmt: skip
    header = ("trial", "label", name.split("/", 1)[1], "drop", "latency (ms)", "int16 operators", "goal", *keys)
    return table(header, rows)


def _path(record: StudyRecord) -> str:
    trials = record.searched.trials
    if not trials:
        return missing("No trial finished.")
    listed = folded(f"All {len(trials)} trials", _trials(record, trials))
    return chart(charts.path_chart(record)) + listed + _failed(record)


def _failed(record: StudyRecord) -> str:
    rows = [[cell(t.number), cell(t.label), cell(t.reason, "wide")] for t in record.searched.failed]
    return folded(f"{len(rows)} failed trials", table(("trial", "label", "reason"), rows)) if rows else ""


def _health(record: StudyRecord) -> str:
    rows = []
    for verdict in health(record.searched):
        kind, word = STATES.get(verdict.state, ("quiet", "unknown"))
        rows.append([cell(verdict.title), cell(word, kind), cell(verdict.text, "wide")])
    return table(("check", "verdict", ""), rows)


def _importances(record: StudyRecord) -> str:
    found = record.searched.importances
    if not found.shares:
        return missing(found.reason)
    words = (
        "fANOVA: share of a metric's variance over all trials that a parameter explains. PED-ANOVA: how much the best "
        "tenth of the trials has it in common. Of a mix that a strategy chose, the int16 share is the measured one."
    )
    return paragraph(words) + chart(charts.importance_chart(record))


def _network(record: StudyRecord) -> str:
    graph, mix = record.graph, record.shown
    if graph is None or mix is None:
        return missing(NOT_RECORDED)
    scores = _scores(record)
    words = (
        f"{len(graph.nodes)} operators under trial {mix.trial.number}, in reading order; dashed lines skip operators "
        "or lead to the next row. Drag to move; buttons, + and -, or the wheel after a click change the size."
    )
    rows = []
    for node in graph.nodes:
        ms = mix.times.get(node.name)
        op = mix.qconfig.ops.get(node.name)
        dtypes = [cell(dtype_of(graph, mix.qconfig, node)), cell(str(op.weight or "") if op else "")]
        cost = [cell(scores.get(node.name)), cell(ms[0] if ms else None)]
        rows.append([cell(node.name, "name"), cell(node.kind.value), *dtypes, *cost])
    header = ("operator", "kind", "output", "weight", "int8 sensitivity", "time (ms)")
    listed = folded(f"The {len(rows)} operators as a table", table(header, rows))
    return paragraph(words) + chart(network_picture(graph, mix, scores)) + listed


def _scores(record: StudyRecord) -> dict[str, float]:
    found = record.analysis.sensitivity
    return found.activation_scores() if found is not None else {}


def _raised(record: StudyRecord) -> str:
    mix = record.shown
    if mix is None:
        return missing(NOT_RECORDED)
    before, scores = record.mixes.get("all-int8"), _scores(record)
    weights = record.analysis.sensitivity.weight_scores() if record.analysis.sensitivity else {}
    causes = {item.target or item.op: item.cause for item in record.analysis.advice or ()}
    rows: list[tuple[float, list[Cell]]] = []
    for name, op in mix.qconfig.ops.items():
        for what, raised, score in (
            (str(op.output), op.output in RAISED, scores.get(name, 0.0)),
            ("weight", op.weight == QDtype.qint16, weights.get(name, 0.0)),
        ):
            if raised:
                rule = rule_words(op.rule) + (f" ({op.fallback})" if op.fallback else "")
                why = [cell(cause_words(causes.get(name, ""))), cell(rule)]
                added = [cell(_added(mix, before, name))]
                rows.append((score, [cell(name, "name"), cell(WORDS.get(what, what)), cell(score), *added, *why]))
    total = len(mix.qconfig.ops)
    if not rows:
        return paragraph(f"Trial {mix.trial.number} keeps all {total} operators at int8.")
    rows.sort(key=lambda entry: -entry[0])
    raises = f"Trial {mix.trial.number} raises {len(rows)} outputs and weights of {total} operators"
    header = ("operator", "precision", "int8 sensitivity", "time over all-int8 (ms)", "cause", "decided by")
    return paragraph(f"{raises}, the most sensitive first.") + table(header, [row for _, row in rows])


def _added(mix: Mix, before: Mix | None, name: str) -> float | None:
    if before is None or name not in mix.times or name not in before.times:
        return None
    return round(mix.times[name][0] - before.times[name][0], 6)


def _cost(record: StudyRecord) -> str:
    if record.shown is None:
        return missing(NOT_RECORDED)
    mixes = record.mixes
    rows = []
    for what, metric in TOTALS.items():
        values = [mix.trial.outcome.metrics.get(metric) for mix in mixes.values()]
        if any(values):
            rows.append([cell(what), *(cell(value) for value in values)])
    refusal = record.shown.trial.outcome.tags.get("qflow.cost_refusal", "")
    note = paragraph(refusal, "bad") if refusal else ""
    words = "Predicted, for one thread; measure on your board before you quote milliseconds."
    shown = chart(charts.cost_chart(record)) if record.shown.times else ""
    return note + paragraph(words) + table(("", *mixes), rows) + "<h3>The costliest operators</h3>" + shown


def _training(record: StudyRecord) -> str:
    training = record.training
    assert training is not None
    words = f"Trial {training.trial.number} {training.trial.label}".rstrip()
    last = f", last loss {number(training.losses[-1])}" if training.losses else ""
    return (
        paragraph(f"{words}: {len(training.losses)} steps{last}.")
        + chart(charts.training_chart(training, "loss"))
        + chart(charts.training_chart(training, "learning rate"))
    )


def _advice(record: StudyRecord) -> str:
    """The advice that the shown mix does not follow already."""
    advice, mix = record.analysis.advice, record.shown
    followed = [item for item in advice or () if mix and is_followed(item, mix.qconfig.ops.get(item.target or item.op))]
    left = None if advice is None else [item for item in advice if item not in followed]
    count = f" Left out: {len(followed)} that trial {mix.trial.number} follows already." if mix and followed else ""
    return paragraph(OF_INT8 + count) + analysis.advice_part(left, record.analysis.fidelity)


def _badcases(record: StudyRecord) -> str:
    pictures = {"The samples that the analysis ran on": record.badcases} if record.badcases else {}
    return analysis.badcases_part(record.analysis.badcases, pictures)


def _check(record: StudyRecord) -> str:
    if record.check is None:
        return missing(NOT_RECORDED)
    rows, findings = record.check
    lowered = [row for row in rows if row.requested != row.applied]
    listed = [
        [cell(r.op, "name"), cell(r.requested), cell(r.applied), cell(r.rule), cell(r.reason, "wide")] for r in lowered
    ]
    words = f"{len(rows)} rows under the shown trial, {len(lowered)} not as requested."
    changed = table(("operator", "requested", "applied", "rule", "reason"), listed) if listed else ""
    return paragraph(words) + changed + "<h3>Findings</h3>" + analysis.findings_part(findings)
