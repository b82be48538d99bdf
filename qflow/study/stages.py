"""The stages of the tuning guide, which the workflows run. A stage with unchanged inputs is read from the cache."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflow.analysis.checks.model_check import check_model
from qflow.analysis.layers.text import layers_line
from qflow.config.settings import plain, trial_settings
from qflow.core.dtype import QDtype
from qflow.core.errors import TrialError
from qflow.report.files import write_study
from qflow.search.domain import Choice
from qflow.search.objective import CONSTRAINT, meets
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import (
    ASSIGNMENT,
    FLOAT16,
    RATIO,
    SENSITIVE_TYPE,
    BudgetSpent,
    assign,
    raise_until_met,
)
from qflow.study.int16_weights import raise_weights, weights_searched
from qflow.study.session import Session
from qflow.study.train_stage import leave_for_training
from qflow.trial.diagnosis import Diagnosis
from qflow.trial.evaluator import Evaluator

ALL_INT16, ALL_INT8 = "all-int16", "all-int8"
TOP = 3  # how many operators a reason names
Strategy = Callable[[Session, FinishedTrial, FinishedTrial, Mapping[str, Any]], None]
"""Takes the session, the baselines at int8 and int16, and the values that make weights part of the search."""
ANALYSIS = "qflow.analysis"  # tag of a study's run: the digest of the inputs of its layers and advice


def begin(session: Session) -> None:
    """Run the first stages: float metric, model check, opening of the study, calibration, analysis of all-int8."""
    evaluator, console = session.evaluator, session.console
    task = evaluator.task
    evaluator.require_samples(*session.largest_calibration())
    evaluator.check_data()
    with console.stage("float") as say, console.bar("float", len(task.data.evaluation), "samples") as advance:
        metric = evaluator.measure_float(advance)
        say(f"{task.metric_name} {metric:.4f} on {evaluator.eval_samples} samples of {task.name}")
    with console.stage("check") as say:
        say(check(session))
    session.open()
    settings = evaluator.default_calibration
    with console.stage("calibrate") as say, console.bar("calibrate", settings.steps, "steps") as advance:
        stats = evaluator.calibrate(settings, advance)
        say(f"{stats.samples} samples in {stats.steps} steps, one pass for every method and dtype")
    diagnose(session)
    leave_for_training(session)
    if session.config.search.early_stop:
        console.say(f"{'early stop':<12} in raising int16 or fp16 up to the goal, and in demotion (search.early_stop)")


def check(session: Session) -> str:
    """Trace the model, prove the float graph unchanged, and return a line with the result of the model check."""
    evaluator = session.evaluator
    graph = evaluator.graph
    settings = trial_settings(session.config).qconfig
    unranked = replace(settings, float16_count=0, assignment="", error_share=None)  # nothing is ranked yet
    unranked = replace(unranked, sensitive_type="activation", counting="operators")
    for ratio in (0.0, 1.0):  # settings by name that are not allowed raise here, before ten trials fail
        evaluator.resolve(replace(unranked, int16_ratio=ratio))
    requested, applied = evaluator.template(QDtype.qint16)
    found = check_model(graph, requested, applied).findings
    lowered = sum(op.output != requested.ops[name].output for name, op in applied.ops.items())
    fused = sum(bool(node.fused) for node in graph.nodes)
    report = evaluator.cost(applied)
    if report.refusal:
        session.console.say(f"{'cost':<12} {report.refusal}")
    checks = sum(f.level == "check" for f in found)
    return (
        f"{len(graph.nodes)} operators ({fused} fused), bit-identical to float; {lowered} int8 only on "
        f"{evaluator.rules.march}, {checks} findings"
    )


def diagnose(session: Session) -> None:
    """Analyse the all-int8 model: bad cases, layer-by-layer comparison, sensitivity and advice.

    Bad cases and sensitivities of an earlier start come from the cache; layers and advice are on the study's run.
    """
    evaluator, console, diagnosis = session.evaluator, session.console, Diagnosis(session.evaluator)
    key = evaluator.analysis_key
    known = bool(key) and session.tracker.run_tags(session.study_run).get(ANALYSIS) == key
    with console.stage("bad cases") as say, console.bar("bad cases", evaluator.badcase_stage.steps, "steps") as advance:
        table = diagnosis.find_badcases(advance)
        say(f"the {len(table.chosen)} worst of {table.samples} samples by {table.metric}")
    with console.stage("layers") as say:
        unchanged = "with the advice on the study's run: nothing that they depend on has changed"
        say(unchanged if known else layers_line(diagnosis.compare_layers()))
    with console.stage("sensitivity") as say, console.bar("sensitivity", evaluator.quantizers, "quantizers") as advance:
        ranked = diagnosis.rank(advance)
        top = ranked.rows[0]
        say(f"{len(ranked.rows)} rows, most sensitive: {top.op_name} ({top.sensitive_type} {top.score:.3g})")
    if known:
        return
    with console.stage("advice") as say:
        advice = diagnosis.advise()
        first = f", first {advice[0].op}: {advice[0].cause} ({advice[0].source})" if advice else ""
        log_tables(session, diagnosis, {ANALYSIS: key})
        say(f"{len(advice)} operators stand out{first}")


def log_tables(session: Session, diagnosis: Diagnosis, tags: Mapping[str, str]) -> None:
    """Log sensitivities, bad cases, the model check of all-int16, and the analysis with its page and pictures.

    `tags` are set last, so that they mark a complete upload.
    """
    from qflow.report.analysis_files import write_analysis  # imports matplotlib and plotly, which are slow to load

    evaluator = session.evaluator
    check = check_model(evaluator.graph, *evaluator.template(QDtype.qint16))
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder), evaluator.sensitivities, evaluator.badcases, check)
        write_analysis(diagnosis, Path(folder) / "analysis", f"{session.study.name}: all-int8 on its bad cases")
        session.tracker.log_study(session.study_run, folder=Path(folder), tags=tags)


def baseline(session: Session, label: str) -> FinishedTrial:
    """Measure the baseline `label`, all-int16 or all-int8, with searched modules at its dtype, all else as configured.

    Raises TrialError if the trial fails, because a study cannot judge trials without its baselines.
    """
    found = session.measure(baseline_point(session, label), label)
    if found is None:
        raise TrialError(f"A study needs its baseline {label}, but that trial failed. Its line above says why.")
    session.baselines[label] = found
    return found


def baseline_point(session: Session, label: str) -> dict[str, Any]:
    """Return the point of the baseline `label`. Its weights are int8, also where they are searched."""
    modules = [key for key in session.study.space if key.startswith("qconfig.modules.")]
    ratio, dtype = (1.0, "qint16") if label == ALL_INT16 else (0.0, "qint8")
    outputs = session.qconfig_at(session.base()).sensitive_type == "activation"
    weights = {} if outputs else {SENSITIVE_TYPE: "activation"}
    return {**session.base(), **dict.fromkeys(modules, dtype), **weights, RATIO: ratio}


def int16_miss_reason(evaluator: Evaluator) -> str:
    """Return why all-int16 loses accuracy, with sensitivities.

    The cause is an operator that the device keeps at int8, activations that are too coarse at int16, or an operator
    whose weight and activation both need int16 (dual int16).
    """
    table = evaluator.sensitivities
    if table is None:
        return "see the sensitivities"
    weights, at8 = table.weight_scores("qint8"), table.activation_scores("qint8")
    at16 = table.activation_scores("qint16")
    applied = evaluator.template(QDtype.qint16)[1].ops.items()
    held = {name: op.fallback for name, op in applied if op.output == QDtype.qint8 and op.fallback}
    hard = max(held, key=lambda name: at8.get(name, 0.0), default="")
    if hard and at8.get(hard, 0.0) >= max([*weights.values(), *at16.values()], default=0.0):
        return f"{hard} stays int8 (activation {at8.get(hard, 0.0):.3g}): {held[hard]}"
    both = {name: min(score, at8.get(name, 0.0)) for name, score in weights.items()}
    coarse = max(at16, key=lambda name: at16[name], default="")
    heavy = max(both, key=lambda name: both[name], default="")
    if coarse and at16[coarse] >= max(weights.values(), default=0.0):
        top = sorted(at16, key=lambda name: -at16[name])[:TOP]
        return "int16 itself is too coarse on " + ", ".join(f"{name} ({at16[name]:.3g})" for name in top)
    if heavy:
        return f"dual int16 suspected on {heavy}: weight {weights[heavy]:.3g}, activation {at8.get(heavy, 0.0):.3g}"
    return "see the sensitivities"


def search_mix(session: Session, int8_baseline: FinishedTrial, int16_baseline: FinishedTrial) -> None:
    """Search the int16 operators by `search.strategy`, until the strategy ends or the budget is spent."""
    strategies: Mapping[str, Strategy] = {
        "optuna": _by_sampler,
        "ratio": _by_ratio,
        "assign": _by_assignment,
    }
    weights = weights_searched(session, int16_baseline)
    before, hits = len(session.trials), session.evaluator.hits
    with session.console.stage("search") as say:
        ended = "done"
        try:
            if weights.get(SENSITIVE_TYPE) == "both":
                raise_weights(session, baseline_point(session, ALL_INT8), QDtype.qint8)
            strategies[session.config.search.strategy](session, int8_baseline, int16_baseline, weights)
        except BudgetSpent as spent:
            ended = str(spent)
        searched = len(session.trials) - before
        known = session.evaluator.hits - hits
        parts = [f"{searched} trials by {session.config.search.strategy}", f"{known} already evaluated"]
        parts += [f"{session.screened} left out that cost too much to be the best"] if session.screened else []
        say(f"{', '.join(parts)}; {ended}")


def _by_sampler(session: Session, int8: FinishedTrial, int16: FinishedTrial, weights: Mapping[str, Any]) -> None:
    """Measure the points of `search.enqueue`, completed by the values of all-int8, then those of the sampler."""
    for point in plain(session.config.search.enqueue):
        known = {k: v for k, v in point.items() if k in session.study.space and k not in session.kept}
        if known:  # skips a point that sets none of the searched keys
            session.measure(
                {**baseline_point(session, ALL_INT8), **weights, **known},
                " ".join(f"{k.split('.')[-1]}={v}" for k, v in known.items()),
            )
    before = dict(session.kept)
    session.kept |= weights
    try:
        while session.sample():
            pass
    finally:
        session.kept = before


def best_calibration(session: Session) -> FinishedTrial | None:
    """Return the all-int8 trial with the best of the searched calibration methods (the guide's basic tuning)."""
    base = baseline_point(session, ALL_INT8)
    methods = session.study.space.get("calibration.method")
    points = [{**base, "calibration.method": m} for m in methods.values] if isinstance(methods, Choice) else [base]
    trials = [t for p in points if (t := session.measure(p, f"all-int8 {_method(session, p)}")) is not None]
    return min(trials, key=lambda t: t.outcome.constraints[CONSTRAINT], default=None)


def _method(session: Session, point: Mapping[str, Any]) -> str:
    return str(point.get("calibration.method", session.config.calibration.method))


def _met_by_calibration(session: Session, int8: FinishedTrial) -> bool:
    if not meets(int8):
        return False
    drop = int8.outcome.metrics["accuracy/drop"]
    session.decide(ALL_INT8, f"drop {drop:+.4f} under {_method(session, int8.params)}: no operator needs int16")
    return True


def _by_ratio(session: Session, int8: FinishedTrial, int16: FinishedTrial, weights: Mapping[str, Any]) -> None:
    int8 = best_calibration(session) or int8
    if not _met_by_calibration(session, int8):
        base = {**int8.params, **weights}
        ratios = session.evaluator.precisions.int16_ratios(
            session.qconfig_at({**base, RATIO: 0.0}), session.goal.budgets
        )
        with session.pass_or_fail():
            raise_until_met(session.measure, base, RATIO, ratios)


def _by_assignment(session: Session, int8: FinishedTrial, int16: FinishedTrial, weights: Mapping[str, Any]) -> None:
    int8 = best_calibration(session) or int8
    if not _met_by_calibration(session, int8):
        base = {**int8.params, **weights, RATIO: 0.0}
        assign(
            session.measure,
            base,
            session.evaluator.precisions.problem(session.qconfig_at(base), session.goal.budgets),
            max_drop=session.goal.max_drop,
            int8_drop=int8.outcome.metrics["accuracy/drop"],
            int16_drop=int16.outcome.metrics["accuracy/drop"],
            top=str(int16.params.get(ASSIGNMENT, "")),
        )


def raise_float16(session: Session) -> FinishedTrial | None:
    """Find the fewest fp16 operators with which all int16 meets the goal; return None if no number of them does."""
    order = session.evaluator.precisions.float16_order
    base = baseline_point(session, ALL_INT16)
    with session.console.stage("fp16") as say:
        with session.pass_or_fail():
            best = raise_until_met(session.measure, base, FLOAT16, list(range(len(order) + 1)), patience=0)
        chosen = order[: int(best.params[FLOAT16] or 0)] if best else ()
        say(
            f"{len(chosen)} of {len(order)} operators that gain from fp16 suffice: {', '.join(chosen)}"
            if best
            else f"operators that gain from fp16: {len(order)}; no number of them meets the goal"
        )
    return best
