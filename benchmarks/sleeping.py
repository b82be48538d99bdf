"""A study on real stores whose trials sleep, in workers of any executor; its results follow from its points."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qflow.executor.pool import Handle, Job, Pool
from qflow.search.domain import Interval, Values
from qflow.search.driver import Driver
from qflow.search.loop import driving
from qflow.search.objective import CONSTRAINT
from qflow.search.outcome import FailedTrial, FinishedTrial, Marker, Outcome
from qflow.search.study import Study
from qflow.tracking.mlflow_tracker import MlflowTracker

SPACE = {"ratio": Interval(0, 1), "percentile": Interval(99, 100)}
DIRECTIONS = ("maximize", "minimize")


def outcome(params: Values) -> Outcome:
    """Return the numbers of a trial at a point."""
    ratio, percentile = float(params["ratio"]), float(params["percentile"])
    drop = 0.1 - 0.1 * ratio + 0.01 * abs(percentile - 99.9)
    metrics = {"accuracy/drop": drop, "cost/latency_ms": 1 + ratio}
    return Outcome((0.9 - drop, 1 + ratio), {CONSTRAINT: drop - 0.05}, dict(params), metrics)


def make(shared: Mapping[str, Any]) -> Handle:
    """Return what a worker does: it sleeps, writes a file, and returns the numbers and where it ran."""

    def handle(task: Mapping[str, Any]) -> dict[str, Any]:
        time.sleep(shared["seconds"])
        (Path(task["folder"]) / "qconfig.json").write_text("{}")
        return {"outcome": asdict(outcome(task["params"])), "place": os.environ.get("RAY_RAYLET_PID", "")}

    return handle


@dataclass(frozen=True)
class _Running:
    job: Job
    seconds: float
    places: list[str]

    def result(self) -> Marker:
        """Wait for the numbers."""
        answer = self.job.result()
        self.places.append(answer["place"])
        found = answer["outcome"]
        return Marker(Outcome(**{**found, "objectives": tuple(found["objectives"])}), "", self.seconds)


@dataclass
class Sleeping:
    """The executor of such a study."""

    pool: Pool[Any]
    seconds: float
    places: list[str]
    """For each result the node that it comes from."""

    @property
    def workers(self) -> int:
        """How many trials run at once."""
        return self.pool.workers

    def submit(self, params: Values, folder: Path) -> _Running:
        """Begin a trial."""
        job = self.pool.submit({"params": dict(params), "folder": str(folder)})
        return _Running(job, self.seconds, self.places)

    def close(self) -> None:
        """End the workers."""
        self.pool.close()


@contextmanager
def study(
    store: Path,
    executor: Sleeping | None,
    on_trial: Callable[[FinishedTrial | FailedTrial], None] = lambda trial: None,
    sampler: str = "random",
) -> Iterator[Driver]:
    """Open such a study below `store`; without executor its trials do not sleep, and run in this process."""
    tracker = MlflowTracker.open(None, store, "executors")
    opened = Study.open(store, "sleeping", space=SPACE, directions=DIRECTIONS, sampler=sampler, n_trials=2000)

    def evaluate(params: Values, folder: Path) -> Outcome:
        (folder / "qconfig.json").write_text("{}")
        return outcome(params)

    scratch = store / "scratch"
    with driving(opened, tracker, evaluate, scratch=scratch, executor=executor, on_trial=on_trial) as driver:
        yield driver


def sample(driver: Driver, n_trials: int) -> None:
    """Add trials until the study has so many."""
    while driver.sample(room=lambda: len(driver.finished) + len(driver.running) < n_trials) is not None:
        pass


def results(driver: Driver) -> list[tuple[int, dict[str, Any], Outcome]]:
    """Return what the trials of a study gave, by number."""
    return [(t.number, dict(t.params), t.outcome) for t in driver.trials]
