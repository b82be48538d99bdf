"""The end of a study: the summary table, the decisions as a document, and the next commands."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qflow.core.credentials import masked
from qflow.core.dtype import QDtype
from qflow.core.errors import TrialError
from qflow.core.store import write_whole
from qflow.core.temporary import TemporaryFolder
from qflow.report.console import SummaryRow, python_command, summary_table
from qflow.search.objective import CONSTRAINT, accurate, nearest_miss, over_budget
from qflow.search.outcome import FinishedTrial
from qflow.study.front import log_decisions
from qflow.study.kept import log_study, settle
from qflow.study.marks import mark_trials, trials_url
from qflow.study.missed import not_tried, tried
from qflow.study.next_steps import promote_command
from qflow.study.paired import applied, goal_margin
from qflow.study.report import VERDICT, report_lines
from qflow.study.result import study_record
from qflow.study.session import Session
from qflow.study.start_trial import against_start
from qflow.trial.record import metrics_of

NAMED = 12  # how many operators the console lists per dtype
FEW_SAMPLES = 3  # a miss by so few samples is no safe verdict


def finish(session: Session) -> tuple[int, dict[str, Any]]:
    """Print table and next steps, and log the document to the study's run.

    Return 0 if the goal is met, else 1, and the result for programs.
    """
    settle(session)
    evaluator, best = session.evaluator, session.best
    shown = best or nearest_miss(session.trials, session.goal.ranking)
    if shown is None:
        return _nothing_finite(session)
    rows = [SummaryRow("float", {session.accuracy: evaluator.float_metric})]
    rows += [SummaryRow(label, trial.outcome.metrics) for label, trial in session.baselines.items()]
    trained = shown.outcome.metrics.get("qat/steps")
    named = ("best trained" if trained else "best mix") if best else "nearest"
    rows.append(SummaryRow(named, shown.outcome.metrics))
    table = summary_table(rows, evaluator.task.metric_name)
    text = verdict(session, best, shown) + against_start(session, shown)
    summary = {re.sub("[- ]", "_", label): trial.outcome.metrics for label, trial in session.baselines.items()}
    if best:
        summary["best"] = best.outcome.metrics
    note = document(session, table, text, shown)
    metrics = {k: v for name, found in summary.items() for k, v in metrics_of(name, found).items()}
    place = _keep(session, note, text, best, metrics)
    mark_trials(session)
    session.console.say("\n" + table)
    _print_lines(session, text, shown, place)
    names = {dtype: list(found) for dtype, found in raised(session, shown).items()}
    following = [promote_command(session.config, session.root)] if best else []
    return 0 if best else 1, {**study_record(session), "verdict": text, "raised": names, "next": following}


def _keep(session: Session, note: str, text: str, best: FinishedTrial | None, metrics: Mapping[str, float]) -> Path:
    """Write the study's document to its folder and its run, with its end as tags; return the path."""
    place = session.root / "studies" / session.study.name / "decision.md"
    write_whole(place, note)
    with TemporaryFolder() as folder:
        (Path(folder) / "decision.md").write_text(note)
        log_decisions(session.driver, session.study_run, session.decisions, session.baselines)
        tags = {"qflow.best": best.run_id if best else "", "qflow.goal": "met" if best else "missed", VERDICT: text}
        log_study(session, folder=Path(folder), metrics=metrics, tags={**tags, "mlflow.note.content": note})
    return place


def _nothing_finite(session: Session) -> tuple[int, dict[str, Any]]:
    """Say that no mix gave finite outputs, which misses the goal. Raises TrialError if no mix was evaluated at all."""
    if not tried(session):
        raise TrialError(
            "A study needs at least one trial, but got none: a budget was spent before the first, or it failed. Raise "
            "search.timeout and search.max_evaluations."
        )
    text = f"{'goal':<12}{session.goal}: missed, no mix that was tried gives finite outputs\n{_lists(session)}"
    place = _keep(session, document(session, "", text), text, None, {})
    session.console.say(f"\n{text}\n{'decisions':<12}{place}\n{report_lines(session)}")
    return 1, {**study_record(session), "verdict": text, "raised": {}, "next": []}


def _print_lines(session: Session, text: str, shown: FinishedTrial, place: Path) -> None:
    """Print the lines below the table: verdict, qconfig, where results are written, and the next commands."""
    say = session.console.say
    say(text)
    trained = shown.outcome.metrics.get("qat/steps", 0.0)
    rate = shown.params.get("qat.learning_rate", session.config.qat.learning_rate)
    how = f", after {trained:.0f} QAT steps at rate {rate:g}" if trained else ""
    say(f"{'qconfig':<12}{shown.outcome.tags['qflow.qconfig']} of trial {shown.number}, run {shown.run_id}{how}")
    for dtype, names in raised(session, shown).items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        say(f"{dtype:<11} {', '.join([*names][:NAMED])}{more}")
    say(f"{'decisions':<12}{place}")
    say(f"{'runs':<12}{masked(session.tracker.uri)}")
    say(f"{'study':<12}{session.study.name} in experiment {session.config.tracking.experiment}")
    say(f"{'cache':<12}read instead of computed: {session.evaluator.cache}")
    say(f"{'time':<12}{session.console.seconds:.0f} s, {session.tracker.seconds:.1f} s of it in tracking")
    ui = session.tracker.ui_command()
    say(f"{'next':<12}{f'{python_command()} -m {ui}' if ui.startswith('mlflow') else ui}")
    if session.best is not None:
        say(f"{'':<12}{promote_command(session.config, session.root)}")
    say(f"{'then open':<12}{trials_url(session)}")
    say(report_lines(session))


def verdict(session: Session, best: FinishedTrial | None, shown: FinishedTrial) -> str:
    """Return whether the goal is met, and if not, by how much it is missed and what to relax."""
    goal, int16 = str(session.goal), session.baselines.get("all-int16")
    if best is not None:
        saved = ""
        if int16 is not None and accurate(int16):
            saved = f"\n{'latency':<12}{_against_int16(session, best, int16)}"
        by = f" by {margin}" if (margin := goal_margin(session, best)) else ""
        return f"{'goal':<12}{goal}: met{by}{saved}"
    over = over_budget(shown)
    if over and accurate(shown):
        found = ", ".join(f"{name} by {by:.4g}" for name, by in over.items())
        missed = f"over {found}; relax that budget, or objective.max_drop"
    elif int16 is not None and int16.outcome.metrics["accuracy/drop"] > session.goal.max_drop:
        cause = (
            "all-int16 misses the goal too: the decisions name the cause, which the float model or training may mend"
        )
        missed = f"by {_miss(session, shown)}; {cause}"
    else:
        advice = f"raise objective.max_drop (to {shown.outcome.metrics['accuracy/drop']:.4f}) or search.n_trials"
        missed = f"by {_miss(session, shown)}; {advice}"
    comma = "," if missed.startswith("over") else ""
    return f"{'goal':<12}{goal}: missed{comma} {missed}\n{_lists(session)}"


def _lists(session: Session) -> str:
    """Return the lines that say what was tried and what was not."""
    rest = not_tried(session)
    return f"{'tried':<12}{tried(session)}" + (f"\n{'not tried':<12}{rest}" if rest else "")


def _miss(session: Session, shown: FinishedTrial) -> str:
    """Return by how much a trial misses the accuracy, with the noise and the number of samples where they are known."""
    few = _samples(session, shown)
    return f"{goal_margin(session, shown) or f'{shown.outcome.constraints[CONSTRAINT]:.4f}'}{few}"


def _samples(session: Session, shown: FinishedTrial) -> str:
    """Return by how many samples the goal is missed if they are few; only for a metric that counts samples."""
    samples, miss = session.evaluator.eval_samples, shown.outcome.constraints[CONSTRAINT]
    hits = [samples * value for value in (session.evaluator.float_metric, shown.outcome.metrics[session.accuracy])]
    few = math.ceil(round(samples * miss, 6))
    if few > FEW_SAMPLES or any(abs(hit - round(hit)) > 1e-6 * samples for hit in hits):
        return ""
    return f", which is {few} of {samples} samples: evaluate on more before you rely on it"


def _against_int16(session: Session, best: FinishedTrial, int16: FinishedTrial) -> str:
    """Return by how much the predicted latency is below all-int16's, and the ratio of BPU times with its interval.

    The ratio says how surely the two differ: what is fixed in one network cancels in it.
    """
    saved = 1.0 - best.outcome.metrics["cost/latency_ms"] / int16.outcome.metrics["cost/latency_ms"]
    if round(100.0 * saved) <= 0:
        return "predicted, not below all-int16"
    change = session.evaluator.pricer.change(applied(session, int16), applied(session, best))
    bpu = f"{change.ratio:.2f} of its BPU time [{change.low:.2f}, {change.high:.2f}]"
    return f"predicted, {saved:.0%} below all-int16 ({bpu})"


def document(session: Session, table: str, text: str, shown: FinishedTrial | None = None) -> str:
    """Return the result in Markdown: table, verdict, each decision with its reason, and the promoted operators."""
    lines = [f"# {session.study.name}", "", "```", table, text, "```", "", "## Decisions", ""]
    lines += [f"{i}. **{stage}**: {words}" for i, (stage, words) in enumerate(session.decisions, 1)]
    count = session.evaluator.graph.n_operators
    for dtype, names in (raised(session, shown) if shown else {}).items():
        lines += ["", f"## {dtype} ({len(names)} of {count} operators)", ""]
        lines += [f"- `{name}`: int8 sensitivity {score:.3g}" for name, score in names.items()]
    return "\n".join(lines) + "\n"


def raised(session: Session, trial: FinishedTrial) -> dict[str, dict[str, float]]:
    """Return the fp16 and int16 operators of a trial's mix and their int8 sensitivity, the most sensitive first.

    The keys are the dtype of the outputs, and `int16 weight` for operators with an int16 weight.
    """
    qconfig, precisions = applied(session, trial), session.evaluator.precisions
    names = {d.value: (qconfig.names(d), precisions.scores) for d in (QDtype.float16, QDtype.qint16)}
    names["int16 weight"] = qconfig.weights(QDtype.qint16), precisions.weight_scores
    return {
        key: {name: scores.get(name, 0.0) for name in sorted(found, key=lambda n: -scores.get(n, 0.0))}
        for key, (found, scores) in names.items()
        if found
    }
