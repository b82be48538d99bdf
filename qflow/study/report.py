"""The report of a study, from what its runs hold: at its end, after an interruption, and at any later time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qflow.analysis.measures.advice import Advice
from qflow.analysis.measures.tables import BadcaseTable, CheckRow, Finding, LayerTable, SensitivityTable
from qflow.config.quoting import assignment
from qflow.config.settings import plain, trial_settings
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.record import from_dict
from qflow.core.store import write_whole
from qflow.core.temporary import TemporaryFolder
from qflow.repair.base.contract import RepairTable
from qflow.report.analysis_page import Analysis
from qflow.report.files import REPAIR
from qflow.report.study_page import study_page
from qflow.report.study_record import Mix, StudyRecord, Training
from qflow.search.domain import Space
from qflow.search.health import Searched
from qflow.search.importance import importances
from qflow.search.objective import MINIMIZE, Goal, aims
from qflow.search.outcome import FailedTrial, FinishedTrial
from qflow.search.stored import space_from_dict, stored_trials
from qflow.study.front import BASELINES, DECISIONS
from qflow.study.manifest import SEQUENCES
from qflow.study.next_steps import report_command
from qflow.study.run_files import RunFiles
from qflow.study.session import Session
from qflow.tracking.limits import param_name
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.views import runs_url
from qflow.trial.record import RUN_METRICS

PAGE = "report.html"  # at the root of the run's artifacts, where the MLflow UI opens a page by its address
VERDICT = "qflow.verdict"  # tag of the study's run: the lines below its final table
GOAL = "qflow.goal"  # tag of a study that has ended


def write_report(tracker: MlflowTracker, study: str, run: str, root: Path) -> Path:
    """Render the report of `study` to studies/<study>/report.html under `root` and to its run; return the path."""
    with TemporaryFolder() as folder:
        text = study_page(load_record(tracker, study, run, Path(folder)))
        beside = Path(folder) / "page"
        beside.mkdir()
        (beside / PAGE).write_text(text, encoding="utf-8")
        tracker.log_study(run, folder=beside)
    place = root / "studies" / study / PAGE
    write_whole(place, text)
    return place


def report_lines(session: Session) -> str:
    """Write the report of a session's study, and return the lines for the console: its path, its address in MLflow.

    A study that took hours must not fail because of its report, so any error is a line too.
    """
    try:
        place = write_report(session.tracker, session.study.name, session.study_run, session.root)
    except Exception as error:
        words = " ".join(str(error).split())
        return (
            f"{'report':<12}not written: {type(error).__name__}: {words}\n"
            f"{'':<12}{report_command(session.config, session.root)}"
        )
    return f"{'report':<12}{place}\n{'':<12}{report_url(session.tracker, session.study_run)}"


def report_url(tracker: MlflowTracker, run: str) -> str:
    """Return the address of the report in the MLflow UI."""
    # the UI opens in its mode for language models by default
    return f"{runs_url(tracker.uri, tracker.experiment_id)}/{run}/artifacts/{PAGE}?workflowType=machine_learning"


def load_record(tracker: MlflowTracker, study: str, run: str, folder: Path) -> StudyRecord:
    """Read everything that the report shows from the store; files are fetched into `folder`."""
    files, tags, params = RunFiles(tracker, folder), tracker.run_tags(run), tracker.run_params(run)
    config = files.config(run)
    accuracy = f"accuracy/{params['metric']}"
    goal = Goal(**plain(config.objective)).aimed(accuracy, params["direction"], (accuracy, *RUN_METRICS))
    searched = _searched(tracker, files, study, run, goal, params["metric"])
    shown = searched.shown
    mixes = {label: _mix(files, trial) for label, trial in searched.baselines.items()}
    if shown is not None and shown.number not in {t.number for t in searched.baselines.values()}:
        mixes = {"best mix" if searched.best else "nearest miss": _mix(files, shown), **mixes}
    rows = files.table(shown.run_id, "model_check.json", CheckRow) if shown else None
    promote = f"python -m qflow.promote {assignment('study', study)}"  # others read the page: no paths, no addresses
    return StudyRecord(
        name=study,
        searched=searched,
        asked=asked(config, goal, params, searched),
        decisions=[(str(stage), str(text)) for stage, text in json.loads(tags.get(DECISIONS, "[]"))],
        verdict=tags.get(VERDICT, ""),
        ended=GOAL in tags,
        address=runs_url(tracker.uri, tracker.experiment_id),
        commands=[("Register the best trial", promote)] if searched.best else [],
        graph=files.record(run, "graph.json", ModelGraph),
        mixes={label: mix for label, mix in mixes.items() if mix is not None},
        analysis=_analysis(files, run),
        badcases=files.fetch(run, "analysis/badcases.png"),
        check=None if rows is None else (rows, files.table(run, "findings.json", Finding) or ()),
        training=_training(files, shown, searched.trials),
        repair=files.record(run, REPAIR, RepairTable),
    )


def _searched(tracker: MlflowTracker, files: RunFiles, study: str, run: str, goal: Goal, metric: str) -> Searched:
    """Read the space, the trials and what the health of the study depends on."""
    space: Space = space_from_dict(files.json(run, "space.json") or {})
    runs, tags = tracker.trial_runs(study), tracker.run_tags(run)
    stored = stored_trials(runs, space, param_name)
    trials = [t for t in stored if t.number >= 0]
    samples, sequences = _evaluation(files, stored)
    searched = Searched(
        space=space,
        goal=goal,
        trials=trials,
        by_hand=[t for t in reversed(stored) if t.number < 0],
        failed=_failed(tracker, runs),
        baselines=_baselines(tags, trials),
        accuracy=f"accuracy/{metric}",
        float_metric=tracker.run_metrics(run).get(f"float/{metric}", math.nan),
        samples=samples,
        sequences=sequences,
        scores=lambda trial: files.scores(trial.run_id if trial else run),
    )
    whole = searched.whole
    cost = next((name for name in goal.ranking if any(name in t.outcome.metrics for t in whole)), None)
    explained = {"accuracy/drop": MINIMIZE, **({cost: goal.ranking[cost]} if cost else {})}
    found = importances(space, whole, explained)
    return replace(searched, importances=found, calibration=_calibration(searched.shown))


def _failed(tracker: MlflowTracker, runs: Sequence[tuple[str, int, str, str | None]]) -> list[FailedTrial]:
    found = []
    for run_id, number, *_ in sorted((r for r in runs if r[2] == "FAILED"), key=lambda r: r[1]):
        tags = tracker.run_tags(run_id)
        reason = tags.get("qflow.end_reason", "no reason is recorded")
        found.append(FailedTrial(number, run_id, {}, tags.get("qflow.label", ""), reason))
    return found


def _baselines(tags: Mapping[str, str], trials: Sequence[FinishedTrial]) -> dict[str, FinishedTrial]:
    by_number = {trial.number: trial for trial in trials}
    kept = json.loads(tags.get(BASELINES, "{}"))
    return {label: by_number[number] for label, number in kept.items() if number in by_number}


def _evaluation(files: RunFiles, trials: Sequence[FinishedTrial]) -> tuple[int, tuple[int, ...]]:
    """Number of evaluation samples, and lengths of the sequences that they form, from the manifest of a trial."""
    manifest = (files.json(trials[-1].run_id, "manifest.json") if trials else None) or {}
    return int(manifest.get("eval_samples", 0)), tuple(manifest.get(SEQUENCES, ()))


def _calibration(trial: FinishedTrial | None) -> tuple[int, int]:
    """(steps, samples) of a trial's calibration."""
    if trial is None:
        return 0, 0
    samples = int(trial.outcome.metrics.get("calibration/samples", 0))
    size = int(str(trial.outcome.params.get("calibration.batch_size") or 1))
    return -(-samples // size), samples


def _mix(files: RunFiles, trial: FinishedTrial) -> Mix | None:
    qconfig = files.record(trial.run_id, "qconfig/qconfig.json", QConfig)
    rows = files.rows(trial.run_id, "cost.json") or []
    times = {row["Name"]: (row["Time (ms)"], row["Low (ms)"], row["High (ms)"]) for row in rows}
    return Mix(trial, qconfig, times) if qconfig is not None else None


def _analysis(files: RunFiles, run: str) -> Analysis:
    advice = files.json(run, "analysis/advice.json")
    return Analysis(
        layers=files.record(run, "analysis/compare_per_layer_record.json", LayerTable),
        sensitivity=files.record(run, "analysis/sensitivity_record.json", SensitivityTable),
        badcases=files.record(run, "analysis/badcase_record.json", BadcaseTable),
        advice=None if advice is None else [from_dict(Advice, item) for item in advice],
        findings=files.table(run, "analysis/findings.json", Finding) or (),
    )


def _training(files: RunFiles, shown: FinishedTrial | None, trials: Sequence[FinishedTrial]) -> Training | None:
    """Loss and rate of the shown trial if it was trained, else of the most accurate trained one."""
    trained = [t for t in trials if t.outcome.metrics.get("qat/steps")]
    if not trained:
        return None
    chosen = shown if shown in trained else min(trained, key=lambda t: t.outcome.metrics["accuracy/drop"])
    assert chosen is not None
    report = files.json(chosen.run_id, "training.json")
    return Training(chosen, report["losses"], report["learning_rates"]) if report else None


def asked(config: DictConfig, goal: Goal, params: Mapping[str, str], searched: Searched) -> list[tuple[str, str]]:
    """Return what the study was asked, in words."""
    task, search = config.task, config.search
    shape = plain(config)["task"].get("deploy_shape")
    keys = "; ".join(f"{key} {_words(domain.to_dict())}" for key, domain in searched.space.items())
    most = [f"{search.n_trials} trials"]
    most += [f"{search.max_evaluations} evaluations"] if search.max_evaluations else []
    most += [f"{search.timeout:g} s"] if search.timeout else []
    qat = f"{config.qat.steps} steps, {config.qat.apply}" if config.qat.steps else "none"
    return [
        ("goal", f"{goal}, against float {searched.float_metric:.4f}"),
        ("aims", aims(goal)),
        ("task", f"{task.name}: {params['metric']}, {params['direction']}, {searched.samples} evaluation samples"),
        ("device", f"{config.device.march}, OpenExplorer {config.device.oe_version}"),
        *([("deployed shape", str(shape))] if shape else []),
        (
            "workflow",
            f"{config.workflow}, search by {search.strategy} with sampler {search.sampler}, seed {config.seed}",
        ),
        ("at most", ", ".join(most)),
        *([("searched", keys)] if keys else []),
        ("repair", ", ".join(trial_settings(config).repair.steps) or "none"),
        ("training", qat),
    ]


def _words(domain: Mapping[str, Any]) -> str:
    if domain["kind"] == "choice":
        return f"of {', '.join(map(str, domain['values']))}"
    if domain["kind"] == "interval":
        return f"from {domain['low']:g} to {domain['high']:g}{' (log)' if domain['log'] else ''}"
    return f"from {domain['start']:g} to below {domain['stop']:g} by {domain['step']:g}"
