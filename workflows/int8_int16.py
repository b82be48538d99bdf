"""The guide's int8/int16 branch: python -m qflow.tune +experiment=int8_int16

    float model -> trace, fuse, check -> calibrate -> bad cases -> layer by layer -> sensitivity -> advice
        -> all-int16 (ceiling) and all-int8 (floor)
        all-int16 misses the goal:   stop; int8/int16 cannot do better than its ceiling
        all-int8 meets the goal:     stop; nothing needs int16
        -> search calibration and int16 ratio for the cheapest mix that meets the goal

The guide ranks after the floor; here the ranking comes first, because it costs seconds, every trial's run then
holds it, and a ceiling that misses is explained by it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflow.analysis.layer_text import layers_line
from qflow.analysis.model_check import check_model
from qflow.config import configured, plain, trial_settings
from qflow.core.dtype import QDtype
from qflow.core.errors import TrialError
from qflow.diagnosis import Diagnosis
from qflow.report.console import SummaryRow, python_command, summary_table
from qflow.search.objective import CONSTRAINT, accurate, best_trial, meets, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.session import Session

ALL_INT16, ALL_INT8 = "all-int16", "all-int8"


def run(session: Session) -> int:
    """All stages; returns the exit code: 0 goal met, 1 not."""
    bench, console = session.bench, session.console
    task = bench.task
    bench.require_samples(*session.largest_calibration())
    bench.peek()
    with console.stage("float") as say, console.bar("float", len(task.data.evaluation), "samples") as advance:
        metric = bench.measure_float(advance)
        say(f"{task.metric_name} {metric:.4f} on {bench.eval_samples} samples of {task.name}")
    with console.stage("check") as say:
        say(check(session))
    session.open()
    settings = bench.default_calibration
    with console.stage("calibrate") as say, console.bar("calibrate", settings.steps, "steps") as advance:
        stats = bench.calibrate(settings, advance)
        say(f"{stats.samples} samples in {stats.steps} steps, one pass for every method and dtype")
    diagnose(session)
    if steps := session.config.qat.steps:
        console.say(f"{'training':<12} each trial is trained after its calibration: {steps} steps (qat.steps)")
    with console.stage("baselines") as say:
        session.run_trials(2, fixed(session, ALL_INT16, ALL_INT8))
        ceiling, floor = (find(session, label) for label in (ALL_INT16, ALL_INT8))
        say(f"all-int16 drop {ceiling['accuracy/drop']:+.4f}, all-int8 drop {floor['accuracy/drop']:+.4f}")
    decision = decide(session)
    if decision:
        console.say(f"{'decision':<12} {decision}")
        return finish(session, decision)
    with console.stage("search") as say:
        session.run_trials(session.config.search.n_trials, [*fixed(session, ALL_INT16, ALL_INT8), *enqueued(session)])
        searched = len(session.trials) - 2
        say(f"{searched} searched beside the 2 baselines, {bench.hits} with a qconfig already evaluated")
    return finish(session, "")


def diagnose(session: Session) -> None:
    """Bad cases, layer-by-layer comparison, sensitivity and advice on the all-int8 model, onto the study's run."""
    bench, console, diagnosis = session.bench, session.console, Diagnosis(session.bench)
    with console.stage("bad cases") as say, console.bar("bad cases", bench.badcase_steps, "steps") as advance:
        table = diagnosis.find_badcases(advance)
        say(f"the {len(table.chosen)} worst of {table.samples} samples by {table.metric}")
    with console.stage("layers") as say:
        say(layers_line(diagnosis.compare_layers()))
    with console.stage("sensitivity") as say, console.bar("sensitivity", bench.quantizers, "quantizers") as advance:
        ranked = diagnosis.rank(advance)
        top = ranked.rows[0]
        say(f"{len(ranked.rows)} quantizers, most sensitive: {top.op_name} ({top.sensitive_type} {top.score:.3g})")
    with console.stage("advice") as say:
        advice = diagnosis.advise()
        first = f", first {advice[0].op}: {advice[0].cause} ({advice[0].source})" if advice else ""
        session.log_stage_tables(diagnosis)
        say(f"{len(advice)} operators stand out{first}")


def check(session: Session) -> str:
    """Trace, prove the float graph unchanged, and say what the model check found."""
    bench = session.bench
    graph = bench.graph
    for ratio in (0.0, 1.0):  # what names ask for must be legal before ten trials fail on it
        bench.resolve(replace(trial_settings(session.config).qconfig, int16_ratio=ratio))
    requested, applied = bench.template(QDtype.qint16)
    found = check_model(graph, requested, applied).findings
    lowered = sum(op.output != requested.ops[name].output for name, op in applied.ops.items())
    fused = sum(bool(node.fused) for node in graph.nodes)
    report = bench.cost(applied)
    if report.refusal:
        session.console.say(f"{'cost':<12} {report.refusal}")
    look = sum(f.level == "check" for f in found)
    return (
        f"{len(graph.nodes)} operators ({fused} fused), bit-identical to float; {lowered} int8 only on "
        f"{bench.rules.march}, {look} findings"
    )


def fixed(session: Session, *labels: str) -> list[tuple[str, Mapping[str, Any]]]:
    """The baselines: every searched key as configured, searched modules at the baseline's dtype, ratio 1 and 0."""
    space = session.study.space
    base = configured(session.config, space)
    modules = [key for key in space if key.startswith("qconfig.modules.")]
    ratio, dtype = {ALL_INT16: 1.0, ALL_INT8: 0.0}, {ALL_INT16: "qint16", ALL_INT8: "qint8"}
    return [
        (label, {**base, **dict.fromkeys(modules, dtype[label]), "qconfig.int16_ratio": ratio[label]})
        for label in labels
    ]


def enqueued(session: Session) -> list[tuple[str, Mapping[str, Any]]]:
    """The points that the configuration wants tried first, at the defaults where they say nothing.

    A point that varies only what the user has fixed is none.
    """
    base = {k: v for k, v in fixed(session, ALL_INT8)[0][1].items() if k in session.study.space}
    known = [{k: v for k, v in p.items() if k in session.study.space} for p in plain(session.config.search.enqueue)]
    points = [point for point in known if point]
    return [(" ".join(f"{k.split('.')[-1]}={v}" for k, v in point.items()), {**base, **point}) for point in points]


def find(session: Session, label: str) -> Mapping[str, float]:
    """Metrics of a baseline. Raises TrialError where it failed: nothing can be judged without it."""
    found = next((t.outcome.metrics for t in session.trials if t.label == label), None)
    if found is None:
        raise TrialError(f"A study needs its baseline {label}, but that trial failed. Its line above says why.")
    return found


def decide(session: Session) -> str:
    """The guide's two early exits, or an empty string to go on."""
    trials = {t.label: t for t in session.trials}
    if not accurate(trials[ALL_INT16]):
        miss = trials[ALL_INT16].outcome.constraints[CONSTRAINT]
        return (
            f"all-int16 misses the goal by {miss:.4f}: no int8/int16 mix is expected to meet it; see the sensitivities"
        )
    if meets(trials[ALL_INT8]):
        return "all-int8 meets the goal: no operator needs int16"
    over = over_budget(trials[ALL_INT8])
    if over:
        found = ", ".join(f"{name} by {by:.4g}" for name, by in over.items())
        return f"all-int8 itself exceeds {found}: no int8/int16 mix costs less; relax the budget or change the model"
    return ""


def finish(session: Session, decision: str) -> int:
    """Ten lines, the study's run completed, and the exit code."""
    trials, bench = session.trials, session.bench
    best = best_trial(trials, session.goal.ranking)
    shown = best or nearest_miss(trials, session.goal.ranking)
    assert shown is not None
    rows = [SummaryRow("float", {session.accuracy: bench.float_metric})]
    rows += [SummaryRow(label, find(session, label)) for label in (ALL_INT16, ALL_INT8)]
    rows.append(SummaryRow("best mix" if best else "nearest", shown.outcome.metrics))
    table = summary_table(rows, bench.task.metric_name)
    summary = {"all_int16": find(session, ALL_INT16), "all_int8": find(session, ALL_INT8)}
    if best:
        summary["best"] = best.outcome.metrics
    session.tracker.log_study(
        session.study_run,
        metrics={f"{name}/{k.split('/', 1)[1]}": v for name, metrics in summary.items() for k, v in metrics.items()},
        tags={
            "qflow.best": shown.run_id if best else "",
            "qflow.goal": "met" if best else "missed",
            "mlflow.note.content": f"# {session.study.name}\n\n```\n{table}\n{verdict(session, best, shown)}\n```\n\n"
            f"{decision}",
        },
    )
    say = session.console.say
    say("\n" + table)
    say(verdict(session, best, shown))
    say(f"{'qconfig':<12}{shown.outcome.tags['qflow.qconfig']} of trial {shown.number}, run {shown.run_id}")
    say(f"{'runs':<12}{session.tracker.uri}")
    say(f"{'study':<12}{session.study.name} in experiment {session.config.tracking.experiment}")
    say(f"{'time':<12}{session.console.seconds:.0f} s, {session.tracker.seconds:.1f} s of it in tracking")
    ui = session.tracker.ui_command()
    say(f"{'next':<12}{f'{python_command()} -m {ui}' if ui.startswith('mlflow') else ui}")
    if best:
        say(f"{'':<12}{promote_command(session)}")
    say(f"{'then open':<12}{session.trials_url()}")
    return 0 if best else 1


def verdict(session: Session, best: FinishedTrial | None, shown: FinishedTrial) -> str:
    """Whether the goal is met, and if not by how much and why."""
    goal = str(session.goal)
    if best is not None:
        m, ceiling = best.outcome.metrics, find(session, ALL_INT16)
        saved = 1.0 - m["cost/latency_ms"] / ceiling["cost/latency_ms"]
        return f"{'goal':<12}{goal}: met, {saved:.0%} less latency than all-int16"
    over = over_budget(shown)
    if over and accurate(shown):
        found = ", ".join(f"{name} by {by:.4g}" for name, by in over.items())
        return f"{'goal':<12}{goal}: missed, over {found}; relax that budget, or objective.max_drop"
    miss = shown.outcome.constraints[CONSTRAINT]
    ceiling_misses = find(session, ALL_INT16)["accuracy/drop"] > session.goal.max_drop
    advice = (
        "int16 itself misses: look at the top sensitivities for a known range (fixed scale) or a weight that is hard"
        if ceiling_misses
        else "raise objective.max_drop or search.n_trials"
    )
    return f"{'goal':<12}{goal}: missed by {miss:.4f}; {advice}"


def promote_command(session: Session) -> str:
    """The command that promotes this study's best trial, with what differs from promote's defaults."""
    config = session.config
    words = [f"{python_command()} -m qflow.promote"]
    if config.study != "perception/int8_int16":
        words.append(f"study={config.study}")
    if session.root != Path("qflow_out").resolve() and "QFLOW_HOME" not in os.environ:
        words.append(f"root={session.root}")
    if config.tracking.uri:
        words.append(f"tracking.uri={config.tracking.uri}")
    if config.task.name != "perception":
        words.append(f"tracking.experiment={config.tracking.experiment}")
        words.append(f"tracking.registered_model={config.tracking.registered_model}")
    return " ".join(words)
