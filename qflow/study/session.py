"""The session of a study: the parts that start.py has opened, and the operations that all workflow stages share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qflow.analysis.measures.tables import BadcaseTable, SensitivityTable
from qflow.bundle.stored import example_digest
from qflow.config.settings import ConfigAt, trial_settings
from qflow.config.space import configured
from qflow.core.agreement import meaning
from qflow.core.record import to_json
from qflow.core.settings import QConfigSettings
from qflow.core.temporary import TemporaryFolder
from qflow.report.console import Console, duration
from qflow.search.domain import Values, as_proposed
from qflow.search.driver import Driver
from qflow.search.loop import driving
from qflow.search.objective import Goal, aims
from qflow.search.outcome import FailedTrial, FinishedTrial, Outcome
from qflow.search.standing import Standing
from qflow.search.strategies import BudgetSpent
from qflow.search.study import Study
from qflow.study.budget import Budget
from qflow.study.evaluate import evaluate_trial
from qflow.study.feasible import check_before, too_costly
from qflow.study.fingerprint import fingerprint
from qflow.study.front import log_decisions, log_front
from qflow.study.identity import identity_tags, require_same
from qflow.study.manifest import data_sets, manifest
from qflow.study.outcome import best_line, trial_line
from qflow.study.shared_files import write_shared
from qflow.study.start_files import StartMix, entry_of
from qflow.study.worker import executor_of
from qflow.tracking.lease import owned
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.trial.evaluator import Evaluator


@dataclass
class Session:
    """The parts of a study, and the operations of its stages on them."""

    config: DictConfig
    evaluator: Evaluator
    goal: Goal
    console: Console
    tracker: MlflowTracker
    study: Study
    root: Path
    stack: ExitStack = field(default_factory=ExitStack)
    """Holds what must be closed when the workflow ends; `open_session` closes it."""
    study_run: str = ""
    driver: Driver | None = None
    budget: Budget = field(init=False)  # made by `drive`
    kept: dict[str, Any] = field(default_factory=dict)
    """Values that every further trial gets: a chosen fp16 count, or no training if that is a stage of its own."""
    baselines: dict[str, FinishedTrial] = field(default_factory=dict)
    """The trials that others are compared with, by label (all-int16, all-int8, ...)."""
    rankings: dict[str, tuple[BadcaseTable, SensitivityTable]] = field(default_factory=dict)
    """Bad cases and sensitivities of further models that a branch has ranked, by digest of the qconfig."""
    measured: list[FinishedTrial] = field(default_factory=list)
    """What `measure` returned in this start, in order; the same after a restart as without one."""
    start: StartMix | None = None  # the user's present mix (search.start)
    decisions: list[tuple[str, str]] = field(default_factory=list)
    """(stage, text) of each decision with its reason."""

    @property
    def accuracy(self) -> str:
        """Name of the task's metric on an MLflow run."""
        return f"accuracy/{self.evaluator.task.metric_name}"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Versions and digests; the same for all trials of a start."""
        return {**manifest(self.evaluator), "example": example_digest(self.shared), **entry_of(self.start)}

    @cached_property
    def shared(self) -> Path:
        """Folder with the files of the study's run that all trials share."""
        folder = Path(self.stack.enter_context(TemporaryFolder()))
        if reason := write_shared(folder, self.config, self.evaluator, self.study.space):
            self.console.say(f"{'example':<12} qflow.load will not find this study's trials: {reason}")
        return folder

    def open(self) -> None:
        """Find or create the study's run, and take the right to add trials.

        Raises ConfigError if the study has trials of other settings or a budget cannot be judged, TrackingError if its
        runs are missing.
        """
        check_before(self.config, self.evaluator, self.goal, self.study.space, self.console.say)
        self.drive()

    def _open_run(self) -> str:
        """Return the study's run, opened again. The caller owns the study and has reconciled the trials."""
        config, task, state = self.config, self.evaluator.task, fingerprint(self.config, self.manifest)
        require_same(self.study, self.tracker, self.root, state)
        self.tracker.datasets = data_sets(self.evaluator)
        self.study_run = run = self.tracker.open_study(
            self.study.name,
            tags={
                "qflow.fingerprint": to_json(state),
                "qflow.workflow": config.workflow,
                **identity_tags(self.study, self.root),
            },
            params={
                "task": config.task.name,
                "march": config.device.march,
                **({"engine": engine} if (engine := self.evaluator.engine.version) else {}),
                "seed": config.seed,
                "objective.max_drop": self.goal.max_drop,
                **{f"objective.{name}": limit for name, limit in self.goal.budgets.items()},
                "metric": task.metric_name,
                "direction": task.direction,
                "search.sampler": config.search.sampler,
            },
            description=f"{self.study.name}: {self.goal}; {aims(self.goal)}. {meaning(task.metric_name)}".strip(),
        )
        self.tracker.log_study(run, folder=self.shared, metrics=self.evaluator.float_metrics)
        return run

    def drive(self) -> None:
        """Take the right to add trials; reconcile and report the trials of an earlier start."""
        own = self.config, self.evaluator, self.manifest, self.root / "cache", self.console.say
        self.evaluator.workers = executor = executor_of(*own)
        if executor is not None:
            self.stack.callback(executor.close)
        self.driver = self.stack.enter_context(
            driving(
                self.study,
                self.tracker,
                self.evaluate,
                scratch=self.root / "scratch",
                executor=executor,
                on_trial=self._on_trial,
                owned=owned(self.tracker, self.study.name, self.root, say=self.console.say),
                open_run=self._open_run,
                say=self.console.say,
            )
        )
        search = self.config.search
        self.budget = Budget(search.n_trials, search.max_evaluations, search.timeout)
        if self.trials:
            kept = f"{len(self.trials)} trials of an earlier start are kept and not repeated"
            self.console.say(f"{'continued':<12} {kept}")
            log_front(self.driver, self.study_run, self.standing, self.goal, self.root)
        self.note_best()

    @property
    def trials(self) -> list[FinishedTrial]:
        """All finished trials of the study, by number."""
        return self.driver.trials if self.driver else []

    @cached_property
    def _standings(self) -> tuple[Standing, Standing]:
        """Of all trials, and of those that count in the search."""
        return Standing(self.goal.ranking, list(self.goal.optimize.values())), Standing(self.goal.ranking)

    @property
    def standing(self) -> Standing:
        """Best trial and Pareto set so far."""
        return self._standings[0].after(self.trials)

    @property
    def best(self) -> FinishedTrial | None:
        """The best trial so far that meets the goal."""
        return self.standing.best

    @property
    def least_metric(self) -> float:
        """The metric that just meets the goal, with a margin for rounding."""
        worse = self.goal.max_drop + 1e-9
        return self.evaluator.float_metric + (-worse if self.evaluator.task.direction == "maximize" else worse)

    @property
    def untrained_best(self) -> FinishedTrial | None:
        """The best trial of the search, without training unless every trial trains; training is for a miss."""
        every = self.config.qat.apply == "every_trial"
        return self._standings[1].after(t for t in self.trials if every or not t.outcome.metrics.get("qat/steps")).best

    def base(self) -> dict[str, Any]:
        """Return a complete point: every searched key as configured, then the values of `kept`."""
        return {**configured(self.config, self.study.space), **self.kept}

    def measure(self, point: Mapping[str, Any], label: str = "") -> FinishedTrial | None:
        """Return the trial at `point`, evaluated unless the study has it; None if it failed. Raises BudgetSpent.

        Searched keys that `point` lacks are taken from `base`.
        """
        assert self.driver is not None
        point = {**self.base(), **point}
        if self.driver.known(point) is None:
            self.budget.require(self.trials, self.untrained_best is not None)
        found = self.driver.measure(point, label)
        self.measured += [found] if isinstance(found, FinishedTrial) else []
        return found if isinstance(found, FinishedTrial) else None

    def room(self) -> bool:
        """Return whether the budget has room for one trial beside those that run."""
        assert self.driver is not None
        try:
            self.budget.require(self.trials, self.untrained_best is not None, len(self.driver.running))
        except BudgetSpent:
            return False
        return True

    def broken(self, point: Mapping[str, Any]) -> bool:
        """Return whether the trial at `point` failed because of the point itself, as outputs that are not finite do."""
        assert self.driver is not None
        found = self.driver.known({**self.base(), **point})
        return isinstance(found, FailedTrial) and found.lasting

    @property
    def begun(self) -> int:
        """Number of trials that are finished or run."""
        return len(self.trials) + (len(self.driver.running) if self.driver else 0)

    def sample(self, inside: Callable[[Values], Values] = as_proposed, more: Callable[[], bool] = lambda: True) -> bool:
        """Evaluate the sampler's next point; return False if the space is exhausted. Raises BudgetSpent.

        With several workers, the points after it are begun as well, while `more()` holds and the budget has room for
        them; False is returned when all that were begun are done.
        `inside` returns values that replace those of the point, such as those of a mix.
        Points that cannot be the best because of their cost are not evaluated (`screened` counts them): those over a
        budget and, if least latency is the first aim and all-int16 meets the goal, those slower than all-int16.
        """
        driver = self.driver
        assert driver is not None

        def room() -> bool:
            if not driver.running:
                self.budget.require(self.trials, self.untrained_best is not None)
            return self.room()

        return driver.sample(self.kept, self._reason_against, inside, lambda: more() and room()) is not None

    @property
    def screened(self) -> int:
        """Number of points that this start has left out because of their cost."""
        return len(self.driver.screened) if self.driver else 0

    def qconfig_at(self, params: Mapping[str, Any]) -> QConfigSettings:
        """Return the settings of the qconfig of a trial at `params`; keys that they leave open are as configured."""
        return trial_settings(self.config_at(params)).qconfig

    @cached_property
    def config_at(self) -> ConfigAt:
        """The configuration at a point, to be read only."""
        return ConfigAt(self.config)

    def _reason_against(self, params: Mapping[str, Any]) -> str:
        return too_costly(self.evaluator, self.goal, self.baselines.get("all-int16"), lambda: self.qconfig_at(params))

    @contextmanager
    def pass_or_fail(self) -> Iterator[None]:
        """Let evaluations inside end once the goal is out of reach (search.early_stop).

        Their metric is then the worst possible one, so no trial ends early if training may have to choose among them.
        """
        early = self.config.search.early_stop and not self.budget.reserved
        self.evaluator.least = self.least_metric if early else None
        try:
            yield
        finally:
            self.evaluator.least = None

    def _on_trial(self, trial: FinishedTrial | FailedTrial) -> None:
        self.note_best()
        line, workers = trial_line(trial, self.accuracy), self.config.executor.workers
        if self.driver is not None:  # else the trial is one of an earlier start
            self.budget.ends.append(time.monotonic())
        if len(self.trials) > 2 and (seconds := self.budget.seconds_left(self.trials, workers)) > 0:
            line += f"  {len(self.trials)} of {self.config.search.n_trials}, about {duration(seconds)} left"
        self.console.say(line)
        if isinstance(trial, FinishedTrial):
            log_front(self.driver, self.study_run, self.standing, self.goal, self.root)

    def decide(self, stage: str, text: str) -> None:
        """Record and print a decision with its reason; the study's document lists all decisions."""
        self.decisions.append((stage, text))
        self.console.say(f"{'decision':<12} {stage}: {text}")
        log_decisions(self.driver, self.study_run, self.decisions, self.baselines)

    def evaluate(self, params: Mapping[str, Any], folder: Path) -> Outcome:
        """Evaluate one trial at `params`: write its files into `folder` and return its numbers."""
        changed = self.config_at(params)
        return evaluate_trial(changed, self.evaluator, self.goal, self.manifest, folder, self.console, params)

    def note_best(self) -> None:
        """Let the progress bars show the best trial so far."""
        self.console.best = best_line(self.best, self.accuracy)
