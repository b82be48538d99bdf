"""One trial by hand, tracked beside those of a study: a mix of the user's own in the same table and the same view."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig

from qflow.bundle.bounded import read_json
from qflow.bundle.stored import example_digest
from qflow.config.quoting import assignment
from qflow.config.settings import patience, root_dir, trial_settings
from qflow.core.agreement import meaning
from qflow.core.errors import ConfigError, TrackingError
from qflow.core.names import check_study_name
from qflow.core.qconfig import QConfig
from qflow.core.record import from_dict, to_json
from qflow.core.temporary import TemporaryFolder
from qflow.report.console import Console
from qflow.search.objective import Goal
from qflow.search.outcome import FinishedTrial, Marker
from qflow.study.assemble import make_evaluator, study_goal
from qflow.study.evaluate import evaluate_trial
from qflow.study.fingerprint import changes, fingerprint
from qflow.study.manifest import data_sets, manifest
from qflow.study.shared_files import write_shared
from qflow.tracking.artifacts import Store
from qflow.tracking.ended import own_runs
from qflow.tracking.lease import claims_of
from qflow.tracking.limits import check_metric_name
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.trial.evaluator import Evaluator

LABEL = "by hand"
VARIED = ("search.", "qconfig.", "calibration.", "qat.", "repair.", "sensitivity.", "workflow", "study", "seed")
"""Settings in which a trial by hand may differ from its study; in model, data, device and goal it must not."""

OWN = ("from_run", "security.")
"""Keys that this command has and a study does not."""


@dataclass
class ByHand:
    """The parts of a trial by hand."""

    config: DictConfig
    console: Console
    tracker: MlflowTracker
    evaluator: Evaluator
    goal: Goal
    root: Path

    @classmethod
    def open(cls, config: DictConfig) -> ByHand:
        """Open the store and build the evaluator. Raises ConfigError, DataError, TrackingError."""
        check_study_name(config.study)
        root = root_dir(config)
        _check_experiment(config, root)
        tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment, patience(config))
        evaluator, console = make_evaluator(config), Console()
        check_metric_name(evaluator.task.metric_name)
        for note in evaluator.task.notes:
            console.say(note)
        evaluator.keep_in(root / "cache", console.say)
        evaluator.check_data()
        return cls(config, console, tracker, evaluator, study_goal(config, evaluator.task), root)

    @cached_property
    def study_run(self) -> str | None:
        """The run of the study that the trial belongs to, if the store has it."""
        return self.tracker.find_study(self.config.study)

    def run(self) -> FinishedTrial:
        """Evaluate the trial and commit it to a run of its own. Raises ConfigError if the study is another model's.

        A run that fails is ended as FAILED with its reason.
        """
        evaluator, console = self.evaluator, self.console
        with console.stage("float") as say, console.bar("float", len(evaluator.task.data.evaluation), "samples") as bar:
            metric = evaluator.measure_float(bar)
            found = meaning(evaluator.task.metric_name) or f"{evaluator.task.metric_name} {metric:.4f}"
            say(f"{found} on {evaluator.eval_samples} samples")
        settings = trial_settings(self.config).qconfig
        if settings.needs_ranking:
            evaluator.repair()
            with console.stage("ranking") as say, console.bar("ranking", evaluator.quantizers, "rows") as bar:
                say(f"{len(evaluator.rank(bar).rows)} rows: qconfig picks operators by their order")
        self.tracker.datasets = data_sets(evaluator)
        evaluator.resolve(settings)  # a name that the model does not have is refused before a run is made
        scratch = self.root / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryFolder(scratch) as name:
            shared, folder = Path(name) / "shared", Path(name) / "trial"
            shared.mkdir()
            folder.mkdir()
            write_shared(shared, self.config, evaluator, {})
            return self._tracked(self._study(shared), folder, example_digest(shared))

    def _study(self, shared: Path) -> str:
        """Return the study's run; without one, a run of this name, which `tune` will continue."""
        found = fingerprint(self.config, manifest(self.evaluator))
        state = {key: text for key, text in found.items() if not key.startswith(OWN)}
        tags = self.tracker.run_tags(self.study_run) if self.study_run else {}
        before = tags.get("qflow.fingerprint", "")
        if self.study_run and (before or claims_of(tags)):  # else what made the run was killed before it was whole
            changed = [text for text in changes(before, state) if not text.startswith(VARIED)]
            if before and changed:
                raise ConfigError(
                    f"A trial by hand has the model, data, device and goal of its study, but got others for "
                    f"{self.config.study}: {', '.join(changed[:3])}. Use another name: study={self.config.study}-2."
                )
            return self.study_run
        task, config = self.evaluator.task, self.config
        with own_runs(self.tracker) as own:
            run = self.tracker.open_study(
                config.study,
                tags={"qflow.workflow": config.workflow, **own},
                params={"task": config.task.name, "march": config.device.march, "metric": task.metric_name},
                description=f"{config.study}: trials by hand; {self.goal}.",
            )
            metrics = self.evaluator.float_metrics
            self.tracker.log_study(run, folder=shared, metrics=metrics, tags={"qflow.fingerprint": to_json(state)})
        return run

    def _tracked(self, study_run: str, folder: Path, example: str) -> FinishedTrial:
        number = min([0, *(n for _, n, *_ in self.tracker.trial_runs(self.config.study))]) - 1
        start = time.monotonic()
        with own_runs(self.tracker):
            run_id = self.tracker.start_trial(study_run, self.config.study, number, LABEL)
            made = {**manifest(self.evaluator), "example": example}
            outcome = evaluate_trial(self.config, self.evaluator, self.goal, made, folder, self.console)
            outcome.check(len(self.goal.optimize))
            marker = Marker(outcome, LABEL, round(time.monotonic() - start, 3))
            self.tracker.commit(run_id, marker.to_json(), outcome.params, outcome.metrics, outcome.tags, folder)
        return FinishedTrial(number, run_id, {}, LABEL, outcome, marker.seconds)

    def best(self) -> tuple[FinishedTrial, QConfig] | None:
        """Return the best trial of the study with its qconfig, if the study has one."""
        study = self.tracker.find_study(self.config.study)
        run_id = self.tracker.run_tags(study).get("qflow.best", "") if study else ""
        text = self.tracker.result(run_id) if run_id else None
        if text is None:
            return None
        marker = Marker.from_json(text)
        number = int(self.tracker.run_tags(run_id).get("qflow.trial", "0"))
        return FinishedTrial(number, run_id, {}, marker.label, marker.outcome, marker.seconds), self.qconfig(run_id)

    def qconfig(self, run_id: str) -> QConfig:
        """Return the qconfig of a trial's run, as the device runs it."""
        with TemporaryFolder() as folder:
            path = self.tracker.download(run_id, "qconfig/qconfig.json", Path(folder))  # where the store puts it
            return from_dict(QConfig, read_json(path.parent, path.name))


def _check_experiment(config: DictConfig, root: Path) -> None:
    """Raise ConfigError if the study is in another experiment, where a second one of its name would be made."""
    with suppress(TrackingError):  # a store that is missing is made by the tracker, or refused with its reason
        found = sorted(Store.open(config.tracking.uri, root, patience(config)).studies(config.study))
        if found and config.tracking.experiment not in found:
            raise ConfigError(
                f"A trial by hand is in the experiment of its study, but got {config.tracking.experiment} for "
                f"{config.study}, which is in {', '.join(found)}. Give the task and keys that the study was tuned with "
                f"(task=..., or {assignment('tracking.experiment', found[0])}), or another name, such as "
                f"study={config.study}-2."
            )
