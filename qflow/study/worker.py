"""Trials in worker processes: what a worker builds from plain data, and the executor that the driver sees.

A worker builds the evaluator from the configuration, as the driver does, and shares the driver's cache folder: the
float metric, the statistics of the calibration and repaired weights are there, each with its key and a checksum.
Trials go through the function that evaluates them in one process too (evaluate.py), so their numbers are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qflow.analysis.measures.tables import SensitivityTable
from qflow.config.settings import ConfigAt, load_resolved
from qflow.core.errors import ConfigError, QflowError, TrialError
from qflow.core.record import from_dict, to_json
from qflow.executor.pool import Answer, Handle, Job, Pool
from qflow.executor.processes import Processes
from qflow.executor.ray_nodes import RayNodes
from qflow.executor.ray_runtime import Runtime
from qflow.report.console import Console
from qflow.search.attempt import attempt, reason_of
from qflow.search.domain import Values
from qflow.search.objective import Goal
from qflow.search.outcome import Marker, Outcome
from qflow.study.assemble import make_evaluator, study_goal
from qflow.study.evaluate import evaluate_trial
from qflow.tasks.identity import Identity
from qflow.trial.evaluator import Evaluator
from qflow.trial.parts import Answering


@dataclass
class Lines(Console):
    """Keeps lines in place of printing them: the driver prints those of a trial when it tells the trial."""

    kept: list[str] = field(default_factory=list)

    @contextmanager
    def bar(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Draw nothing, because several workers share a terminal."""
        yield lambda position: None

    def say(self, text: str) -> None:
        """Keep one line."""
        self.kept.append(text)


@dataclass
class Trials:
    """What a worker has built, and the ranking that it was last given."""

    config: ConfigAt
    evaluator: Evaluator
    goal: Goal
    manifest: Mapping[str, Any]
    console: Lines
    ranking: str = ""

    def __post_init__(self) -> None:
        self.answering = Answering(self.evaluator.answering)

    def __call__(self, task: Mapping[str, Any]) -> Answer:
        """Evaluate a trial or answer a part of an analysis; return with it the lines to print."""
        self.console.kept.clear()
        found = self._part(task) if "part" in task else self._trial(task)
        return {**found, "lines": list(self.console.kept)}

    def _part(self, task: Mapping[str, Any]) -> Answer:
        try:
            return dict(self.answering(task))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the driver computes it, and meets the same error
            return {"reason": str(error) if isinstance(error, QflowError) else reason_of(error)}

    def _trial(self, task: Mapping[str, Any]) -> Answer:
        """Return the outcome of the point of a task, or why it failed."""
        self.answering.leave()
        folder, evaluator = Path(task["folder"]), self.evaluator
        for left in folder.iterdir():  # by a worker that died over this trial
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if (ranking := task["ranking"]) != self.ranking:
            self.ranking = ranking
            evaluator.sensitivities = from_dict(SensitivityTable, json.loads(ranking)) if ranking else None
        evaluator.least = task["least"]
        try:
            return asdict(attempt(self._evaluate, task["params"], folder, len(self.goal.optimize)))
        except TrialError as error:
            return {"reason": str(error), "lasting": error.lasting}

    def _evaluate(self, params: Values, folder: Path) -> Outcome:
        changed = self.config(params)
        return evaluate_trial(changed, self.evaluator, self.goal, self.manifest, folder, self.console, params)


def make_trials(shared: Mapping[str, Any]) -> Handle:
    """Build what all trials need, in a worker. What cannot be built fails every trial with its reason."""
    try:
        return _trials(shared)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as in `attempt`
        reason = str(error) if isinstance(error, ConfigError) else reason_of(error)
        return lambda task: {"reason": reason, "lasting": False, "lines": []}


def _trials(shared: Mapping[str, Any]) -> Trials:
    config, console = load_resolved(shared["config"]), Lines()
    evaluator = make_evaluator(config)
    evaluator.keep_in(Path(shared["cache"]), console.say)
    driver = from_dict(Identity, shared["identity"])
    if other := evaluator.identity.differing(driver):
        raise ConfigError(
            f"A worker builds the model and data of the study, but got another {' and '.join(other)}. Make them the "
            "same at each start and on each machine, or use executor=serial."
        )
    evaluator.identity = replace(evaluator.identity, content=driver.content)  # the names of what is cached
    evaluator.measure_float()
    goal = study_goal(config, evaluator.task)
    return Trials(ConfigAt(config), evaluator, goal, shared["manifest"], console)


@dataclass(frozen=True)
class _Asked:
    job: Job
    say: Callable[[str], None]

    def result(self) -> Answer:
        answer = self.job.result()
        for line in answer.pop("lines"):
            self.say(line)
        return answer


@dataclass(frozen=True)
class _Elsewhere:
    asked: _Asked

    def result(self) -> Marker:
        answer = self.asked.result()
        if "outcome" in answer:  # not as a marker's text, which makes floats of integers
            outcome = answer["outcome"]
            return Marker(Outcome(**{**outcome, "objectives": tuple(outcome["objectives"])}), "", answer["seconds"])
        error = TrialError(answer["reason"])
        error.lasting = answer["lasting"]
        raise error


@dataclass
class InWorkers:
    """Evaluates the trials of a study, and parts of its analysis, in worker processes."""

    evaluator: Evaluator
    pool: Pool[Any]
    say: Callable[[str], None]
    timeout: float | None = None
    """Seconds that a trial may take."""
    _ranking: tuple[SensitivityTable | None, str] = (None, "")

    @property
    def workers(self) -> int:
        """How many trials run at once."""
        return self.pool.workers

    def submit(self, params: Values, folder: Path) -> _Elsewhere:
        """Begin the trial at `params`, under the present ranking of the operators."""
        table = self.evaluator.sensitivities
        if table is not self._ranking[0]:
            self._ranking = (table, to_json(table) if table is not None else "")
        task = {"params": dict(params), "folder": str(folder), "least": self.evaluator.least}
        job = self.pool.submit({**task, "ranking": self._ranking[1]}, self.timeout)
        return _Elsewhere(_Asked(job, self.say))

    def ask(self, task: Mapping[str, Any]) -> _Asked:
        """Begin a part of an analysis."""
        return _Asked(self.pool.submit(task), self.say)

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


def executor_of(
    config: DictConfig, evaluator: Evaluator, manifest: Mapping[str, Any], cache: Path, say: Callable[[str], None]
) -> InWorkers | None:
    """Return what evaluates the trials of a study; None for this process. Workers start with the first trial.

    Raises ConfigError if there is no Ray cluster at `executor.address`, or none of its nodes can hold a worker.
    """
    executor = config.executor
    if executor.kind == "serial":
        return None
    own = config.copy()
    own.root = str(own.root)  # may name a folder by the working folder that Hydra knows in this process alone
    shared = {
        "config": OmegaConf.to_yaml(own),
        "cache": str(cache),
        "identity": json.loads(to_json(evaluator.identity)),
        "manifest": json.loads(to_json(manifest)),
    }
    backend: Processes | RayNodes = Processes(make_trials, shared)
    if executor.kind != "process":
        cpus = max(executor.threads, 1)
        runtime = Runtime(None if executor.kind == "ray" else executor.address, executor.workers * cpus)
        backend = RayNodes(make_trials, shared, runtime, evaluator.cache.files, cpus, executor.gpus)
        if executor.kind == "ray_cluster":
            backend.open()  # before anything long runs
    pool: Pool[Any] = Pool(backend, executor.workers, executor.max_retries, say)
    return InWorkers(evaluator, pool, say, executor.trial_timeout)
