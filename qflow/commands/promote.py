"""python -m qflow.promote: rebuild the best trial from its run alone, verify every number, move the alias to it.

The trial is rebuilt from the configuration and qconfig of its run. The qconfig must still be legal on the device and
follow from the configuration; metric, latency and scales must come out as the run states them, and meet the goal.
Otherwise the command prints every reason, registers nothing, and ends with exit code 1.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from qflow.config.command import run_command
from qflow.config.quoting import assignment
from qflow.config.settings import load_resolved, plain, root_dir, trial_settings
from qflow.core.errors import PromotionError, TrackingError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.tracking.mlflow_tracker import MlflowTracker
    from qflow.trial.evaluator import Evaluator

METRIC_TOLERANCE = 1e-6  # the same configuration and seed give the same numbers on one machine
FILES = ("config.yaml", "qconfig/qconfig.json", "manifest.json", "sensitivity_record.json")


def main() -> None:
    """Entry point."""
    run_command("promote", promote)


@dataclass(frozen=True)
class LoggedTrial:
    """A trial's run as it was logged."""

    run_id: str
    config: DictConfig
    qconfig: Any
    manifest: dict[str, Any]
    sensitivities: Any
    metrics: dict[str, float]
    tags: dict[str, str]


def promote(config: DictConfig) -> int:
    """Pick, rebuild, compare, register. Returns 0, or 1 with every reason printed."""
    from qflow.report.files import BUNDLE
    from qflow.tracking.mlflow_tracker import MlflowTracker
    from qflow.tracking.registry import champion, check_alias, register

    alias = config.tracking.alias
    check_alias(alias)
    root = root_dir(config)
    tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment)
    run_id = config.run or best_run(tracker, config.study)
    with tempfile.TemporaryDirectory() as folder:
        trial = load(tracker, run_id, Path(folder))
        name = registered_name(config, trial)
        print(f"{'run':<12}{run_id}, qconfig {trial.qconfig.digest}, of {trial.tags.get('qflow.study', '?')}")
        print(f"{'rebuild':<12}the trial, from its run and your code", flush=True)
        reasons = compare(trial)
        if reasons:
            for reason in reasons:
                print(f"{'refused':<12}{reason}")
            return 1
    before = champion(tracker, name, alias)
    if before is not None and before[1] == run_id:
        print(f"{'champion':<12}{name} version {before[0]} is this run already; alias {alias} stays")
        return 0
    shown = ("accuracy/drop", "cost/latency_ms", "qconfig/int16_ratio")
    version = register(
        tracker,
        name,
        run_id,
        BUNDLE,
        alias,
        tags={"qflow.qconfig": trial.qconfig.digest, **{k: f"{trial.metrics[k]:.6g}" for k in shown}},
        description=", ".join(f"{k} {trial.metrics[k]:.4g}" for k in shown),
    )
    came = f", before it version {before[0]}" if before else ""
    print(f"{'champion':<12}{name} version {version}, alias {alias} moved{came}")
    print(f"{'read it':<12}models:/{name}@{alias}")
    return 0


def registered_name(config: DictConfig, trial: LoggedTrial) -> str:
    """Return the name in the registry: the one that the command states, else that of the run."""
    from qflow.tracking.limits import model_name

    unresolved: Any = OmegaConf.to_container(config.tracking, resolve=False)
    stated = "${" not in unresolved["registered_model"]  # the default follows task.name
    return model_name((config if stated else trial.config).tracking.registered_model)


def best_run(tracker: MlflowTracker, study: str) -> str:
    """Run id of the study's best trial. Raises TrackingError for an unknown study, PromotionError without one."""
    found = tracker.find_study(study)
    if found is None and (elsewhere := tracker.experiments_with(study)):
        raise TrackingError(
            f"A study is looked for in its tracking.experiment, but got {study}, which is in {', '.join(elsewhere)}. "
            f"Add {assignment('tracking.experiment', elsewhere[0])}."
        )
    if found is None:
        raise TrackingError(
            f"A study must exist to be promoted, but got {study}, unknown in {tracker.uri}. "
            "Run qflow.tune first, or name it: study=<name>."
        )
    tags = tracker.run_tags(found)
    if not tags.get("qflow.best"):
        why = "missed its goal" if tags.get("qflow.goal") == "missed" else "has not ended yet"
        raise PromotionError(
            f"A study is promoted by its best trial, but {study} {why}. Tune further, or name run=<id>."
        )
    return tags["qflow.best"]


def load(tracker: MlflowTracker, run_id: str, folder: Path) -> LoggedTrial:
    """What a rebuild needs, from the run alone. Raises PromotionError unless the run is a finished trial."""
    from qflow.analysis.measures.tables import SensitivityTable
    from qflow.bundle.files import PROFILE
    from qflow.core.qconfig import QConfig
    from qflow.core.record import from_dict

    try:
        result = tracker.result(run_id)
    except TrackingError as error:
        if "not found" in str(error):
            raise PromotionError(
                f"A run must exist to be promoted, but got {run_id}, unknown in {tracker.uri}. Name another run."
            ) from error
        raise
    if result is None:
        raise PromotionError(
            f"A promoted run is a finished trial, but got {run_id} without a result. Name another run."
        )
    texts = {}
    for name in FILES:
        try:
            texts[name] = tracker.download(run_id, name, folder).read_text()
        except TrackingError:
            if name != "sensitivity_record.json":  # the baselines are evaluated before the sensitivities exist
                raise
    record, tags = texts.get("sensitivity_record.json"), tracker.run_tags(run_id)
    config = load_resolved(texts["config.yaml"])
    if config.device.profile and (study := tags.get("mlflow.parentRunId")):
        with suppress(TrackingError):  # a study of an older qflow has no copy: use the file at its path
            config.device.profile = str(tracker.download(study, PROFILE, folder))
    return LoggedTrial(
        run_id=run_id,
        config=config,
        qconfig=from_dict(QConfig, json.loads(texts["qconfig/qconfig.json"])),
        manifest=json.loads(texts["manifest.json"]),
        sensitivities=from_dict(SensitivityTable, json.loads(record)) if record else None,
        metrics=tracker.run_metrics(run_id),
        tags=tags,
    )


def compare(trial: LoggedTrial) -> list[str]:
    """Rebuild the trial and list every reason against it; an empty list lets it pass."""
    from qflow.core.errors import QflowError
    from qflow.cost_model.table import cost_metrics
    from qflow.search.objective import Goal
    from qflow.study.assemble import make_evaluator

    if not trial.config.executor.threads:  # another number of threads sums in another order
        trial.config.executor.threads = trial.manifest.get("threads", 0)
    evaluator = make_evaluator(trial.config)
    evaluator.sensitivities = trial.sensitivities
    settings = trial_settings(trial.config)
    reasons = identity(evaluator, trial)
    try:
        evaluator.measure_float()
        requested, applied = evaluator.resolve(settings.qconfig)
        if applied.digest != trial.qconfig.digest:
            names = ", ".join(list(applied.diff(trial.qconfig))[:3])
            reasons.append(f"the configuration gives another qconfig than the run holds: {names} differ")
        result = evaluator.run_qconfig(requested, trial.qconfig, settings)
    except QflowError as error:
        return [*reasons, f"the trial cannot be rebuilt: {error}"]
    metric = f"accuracy/{evaluator.task.metric_name}"
    for name, value in {
        metric: result.metric,
        "accuracy/drop": result.drop,
        "cost/latency_ms": result.cost.latency_ms,
    }.items():
        logged = trial.metrics.get(name)
        print(f"{name:<18}{'-' if logged is None else f'{logged:.6g}':>12} logged {value:>12.6g} rebuilt")
        if logged is None or abs(logged - value) > METRIC_TOLERANCE + 1e-5 * abs(value):
            reasons.append(f"{name} was logged as {logged}, rebuilt it is {value:.6g}")
    if result.scales_digest != trial.tags.get("qflow.scales"):
        reasons.append("the calibrated scales differ from those of the run: other data, weights or versions")
    goal = Goal(**plain(trial.config.objective))
    for name, excess in goal.constraints({"accuracy/drop": result.drop, **cost_metrics(result.cost)}).items():
        if excess > 0:
            reasons.append(f"the goal ({goal}) is missed: {name} by {excess:.4g}")
    return reasons


def identity(evaluator: Evaluator, trial: LoggedTrial) -> list[str]:
    """Weights, data or profile other than the run's; named first, because they explain the rest."""
    from qflow.study.manifest import manifest

    now = manifest(evaluator)
    logged = {"profile": "", **trial.manifest}
    return [
        f"{name} are not those of the run: {now[part] or 'none'} instead of {logged.get(part) or 'none'}"
        for part, name in {"weights": "weights", "data": "data", "profile": "measured times"}.items()
        if now[part] != logged.get(part)
    ]
