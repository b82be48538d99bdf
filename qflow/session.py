"""A study at work: the parts that a door has assembled, and what the stages of every workflow have in common."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qflow import config as conf
from qflow.analysis.model_check import check_model
from qflow.bench import Bench
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, TrackingError
from qflow.core.record import digest, to_json
from qflow.diagnosis import Diagnosis
from qflow.feasible import check_search
from qflow.manifest import manifest
from qflow.report.console import Console
from qflow.report.files import write_study, write_trial
from qflow.search.loop import FailedTrial, FinishedTrial, Outcome, run_trials
from qflow.search.objective import Goal, aims, best_trial, meets
from qflow.search.study import Study
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.views import save_view, study_url
from qflow.trial import TrialResult, run_metrics

# What may change between two starts of one study; everything else must stay as it was.
FREE = (
    *("root", "search.n_trials", "search.timeout", "search.enqueue", "tracking."),
    *("executor.threads", "task.batch_size"),
)
SINCE = ("search.when", "objective.optimize")  # empty they say nothing: studies from before there were such keys go on
LEGIBLE = 40  # characters of a setting that the study's tag holds as they are; longer ones by digest


@dataclass
class Session:
    """Everything a workflow works with. `trials` are the finished ones, those of earlier starts included."""

    config: DictConfig
    bench: Bench
    goal: Goal
    console: Console
    tracker: MlflowTracker
    study: Study
    root: Path
    study_run: str = ""
    trials: list[FinishedTrial] = field(default_factory=list)

    @property
    def accuracy(self) -> str:
        """Name of the task's metric on a run."""
        return f"accuracy/{self.bench.task.metric_name}"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Versions and fingerprints; the same for all trials of a start."""
        return manifest(self.bench)

    def open(self) -> None:
        """Find or make the study's parent run.

        Raises ConfigError if its trials were made with other settings or cannot be judged, TrackingError if its runs
        are gone.
        """
        check_search(self.bench, self.goal, conf.module_settings(self.config, self.study.space))
        state = fingerprint(self.config, self.manifest)
        found = self.tracker.find_study(self.study.name)
        finished = sum(trial.state == "complete" for trial in self.study.trials())
        if found is None and finished:
            raise TrackingError(
                f"A study's runs are in its tracking store, but {self.study.name} has {finished} finished trials and "
                f"no run in {self.tracker.uri}. Bring the store back, or use another name: study={self.study.name}-2."
            )
        if found is not None and finished:
            changed = changes(self.tracker.run_tags(found).get("qflow.fingerprint", ""), state)
            if changed:
                raise ConfigError(
                    f"A study goes on with what it began with, but got other settings for {self.study.name}: "
                    f"{', '.join(changed[:4])}. Use another name: study={self.study.name}-2."
                )
        config, task = self.config, self.bench.task
        self.study_run = self.tracker.open_study(
            self.study.name,
            tags={"qflow.fingerprint": to_json(state), "qflow.workflow": config.workflow},
            params={
                "task": config.task.name,
                "march": config.device.march,
                "seed": config.seed,
                "objective.max_drop": self.goal.max_drop,
                **{f"objective.{name}": limit for name, limit in self.goal.budgets.items()},
                "metric": task.metric_name,
                "direction": task.direction,
                "search.sampler": config.search.sampler,
            },
            description=f"{self.study.name}: {self.goal}; {aims(self.goal)}.",
        )
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.yaml").write_text(conf.resolved_yaml(config))
            metrics = {f"float/{task.metric_name}": self.bench.float_metric}
            self.tracker.log_study(self.study_run, folder=Path(folder), metrics=metrics)

    def largest_calibration(self) -> tuple[int, int]:
        """The largest batch size and number of steps that the default or the search can ask for."""
        sizes = []
        for key in ("batch_size", "steps"):
            default = int(getattr(self.bench.default_calibration, key))
            domain = self.study.space.get(f"calibration.{key}")
            points = [int(p) for p in (domain.points() if domain else ()) if isinstance(p, (int, float))]
            sizes.append(max([default, *points]))
        return sizes[0], sizes[1]

    def run_trials(self, n_trials: int, fixed: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Evaluate until the study holds `n_trials` trials; a line for each, and the bar where there is one."""
        known = {trial.number for trial in self.trials}
        with self.console.bar("trials", n_trials, "trials") as advance:

            def on_trial(trial: FinishedTrial | FailedTrial) -> None:
                if isinstance(trial, FinishedTrial):
                    self.trials.append(trial)
                    self.note_best()
                self.console.say(trial_line(trial, self.accuracy))
                advance(len(self.trials))

            finished = run_trials(
                self.study,
                self.tracker,
                self.evaluate,
                n_trials=n_trials,
                fixed=fixed,
                timeout=self.config.search.timeout,
                scratch=self.root / "scratch",
                on_trial=on_trial,
                study_run_id=self.study_run,
            )
        earlier = len(finished) - len(self.trials)
        if earlier > 0 and not known:
            self.console.say(f"{'continued':<12} {earlier} trials of an earlier start stand and are not repeated")
        self.trials = finished
        self.note_best()

    def evaluate(self, params: Mapping[str, Any], folder: Path) -> Outcome:
        """One trial as a function of its parameters: files into `folder`, numbers into the outcome."""
        changed = conf.with_params(self.config, params)
        settings = conf.trial_settings(changed)
        with self.console.bar("trial", self.bench.eval_samples, "samples") as advance:
            result = self.bench.run_trial(settings, advance)
        write_trial(
            folder,
            result,
            config_yaml=conf.resolved_yaml(changed),
            manifest=self.manifest,
            sensitivities=self.bench.sensitivities,
        )
        return outcome(result, self.goal, self.accuracy, {**trial_params(changed), **switches(params)})

    def note_best(self) -> None:
        """Keep best-so-far where the bars show it."""
        best = best_trial(self.trials, self.goal.ranking)
        if best is None:
            self.console.best = "best: none meets the goal yet"
            return
        m = best.outcome.metrics
        self.console.best = (
            f"best: {m[self.accuracy]:.4f} drop {m['accuracy/drop']:+.4f} {m['cost/latency_ms']:.3f} ms "
            f"int16 {m['qconfig/int16_ratio']:.2f}"
        )

    def trials_url(self) -> str:
        """Where `mlflow ui` shows this study's trials, accuracy against latency, by a view saved with the study."""
        host = self.tracker.uri if self.tracker.uri.startswith("http") else "http://127.0.0.1:5000"
        key = save_view(self.tracker, self.study.name, params=list(self.study.space))
        return study_url(host, self.tracker.experiment_id, self.study.name, key)

    def log_stage_tables(self, diagnosis: Diagnosis) -> None:
        """Sensitivities, bad cases, the model check of all-int16, and the analysis with its page and pictures."""
        requested, applied = self.bench.template(QDtype.qint16)
        check = check_model(self.bench.graph, requested, applied)
        with tempfile.TemporaryDirectory() as folder:
            write_study(Path(folder), self.bench.sensitivities, self.bench.badcases, check)
            diagnosis.write(Path(folder) / "analysis", f"{self.study.name}: all-int8 on its bad cases")
            self.tracker.log_study(self.study_run, folder=Path(folder))


def trial_params(config: DictConfig) -> dict[str, Any]:
    """The scalars of a trial that someone will sort or group by."""
    node = {"calibration": conf.plain(config.calibration), "qconfig": conf.plain(config.qconfig)}
    if config.qat.steps:
        node["qat"] = conf.plain(config.qat)
    return {
        f"{group}.{key}": value
        for group, values in node.items()
        for key, value in values.items()
        if isinstance(value, (str, int, float, bool))
    }


def switches(params: Mapping[str, Any]) -> dict[str, Any]:
    """Searched modules under names that MLflow takes: `[add](1)` becomes `_add__1_`."""
    return {re.sub(r"[^\w.\-/ :]", "_", key): value for key, value in params.items() if conf.owner(key)}


def outcome(result: TrialResult, goal: Goal, accuracy: str, params: Mapping[str, Any]) -> Outcome:
    """Objectives, constraints, and what MLflow shows of a trial."""
    cost, metrics = result.cost, run_metrics(result, accuracy)
    return Outcome(
        objectives=goal.objectives(metrics),
        constraints=goal.constraints(metrics),
        params=params,
        metrics=metrics,
        tags={
            **({"qflow.cost_refusal": cost.refusal} if cost.refusal else {}),
            "qflow.qconfig": result.qconfig.digest,
            "qflow.scales": result.scales_digest,
            "qflow.shared": str(result.shared).lower(),
        },
    )


def trial_line(trial: FinishedTrial | FailedTrial, accuracy: str) -> str:
    """One line a trial."""
    name = f"trial {trial.number} {trial.label}".strip()
    if isinstance(trial, FailedTrial):
        return f"{name:<24} failed: {trial.reason}"
    m, p = trial.outcome.metrics, trial.outcome.params
    verdict = "meets" if meets(trial) else "misses"
    amount = f"{p['calibration.batch_size']}x{p['calibration.steps']}"
    trained = f"  QAT {m['qat/steps']:.0f} steps" if "qat/steps" in m else ""
    return (
        f"{name:<24} {m[accuracy]:.4f} drop {m['accuracy/drop']:+.4f} {m['cost/latency_ms']:7.3f} ms  int16 "
        f"{m['qconfig/int16_ratio']:.2f}  {p['calibration.method']:<10} {amount:<7} {verdict:<6} {trial.seconds:5.1f} s"
        f"{trained}"
    )


def fingerprint(config: DictConfig, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What results depend on, by dotted key: the configuration, weights, data, graph and versions."""
    state = {
        key: text if len(text := to_json(value)) <= LEGIBLE else digest(value)
        for key, value in flat(conf.plain(config))
        if not key.startswith(FREE) and (value or key not in SINCE)
    }
    named = config.objective.optimize
    return {
        **state,
        **({"objective.optimize": ", ".join(named)} if named else {}),  # their order decides which value is which
        **{key: str(manifest[key]) for key in ("weights", "data", "graph", "profile", "eval_samples", "qflow")},
        "float_metric": f"{manifest['float_metric']:.6g}",
        "torch": manifest["versions"]["torch"],
    }


def flat(node: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested mapping by dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in node.items():
        found += flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else [(f"{prefix}{key}", value)]
    return found


def changes(before: str, now: Mapping[str, str]) -> list[str]:
    """`key: old -> new` for what differs from the text that `Session.open` kept."""
    known: dict[str, str] = json.loads(before or "{}")
    return [
        f"{key}: {known.get(key, 'nothing')} -> {now.get(key, 'nothing')}"
        for key in sorted({*known, *now})
        if known.get(key) != now.get(key)
    ]
