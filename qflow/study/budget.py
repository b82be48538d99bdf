"""The budget of a study: trials, evaluations and time, and the part that is reserved for training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qflow.search.driver import FAILURES, Driver
from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent

PACE = 8  # trials whose pace tells the time left, or four for each worker


@dataclass
class Budget:
    """`search.n_trials`, `search.max_evaluations` and `search.timeout` (seconds from now) of a study."""

    trials: int
    evaluations: int | None = None
    timeout: float | None = None
    reserved: int = 0
    """Trials (and evaluations) reserved for training while no trial meets the goal; at most half of the search's."""
    spare: int = 0
    """Trials that exploration leaves for measuring the best mix with fewer promotions; at most a quarter of all."""
    began: float = field(default_factory=time.monotonic)
    ends: list[float] = field(default_factory=list)
    """When trials of this start ended, finished or failed."""

    def require(self, done: Sequence[FinishedTrial], met: bool, running: int = 0) -> None:
        """Raise BudgetSpent if no further trial may start. With `met` no training is needed, so nothing is reserved.

        A trial that runs counts as one trial and one evaluation.
        """
        counts = [("trials", len(done) + running, self.trials, "search.n_trials")]
        if self.evaluations is not None:
            counts.append(("evaluations", evaluations(done) + running, self.evaluations, "search.max_evaluations"))
        for what, spent, limit, key in counts:
            held = 0 if met else min(self.reserved, max(limit - 2, 0) // 2)
            spare = min(self.spare, limit // 4)
            if spent >= limit - held - spare:
                left = f", {limit - spent} are left for training" if held else ""
                left = left or (f", {limit - spent} are left to lower the best mix" if spent < limit else "")
                raise BudgetSpent(f"{spent} of {limit} {what} are run ({key}){left}")
        if self.timeout is not None and time.monotonic() - self.began >= self.timeout:
            raise BudgetSpent(f"{self.timeout:g} s have passed (search.timeout)")

    def seconds_left(self, done: Sequence[FinishedTrial], workers: int = 1) -> float:
        """Estimate the seconds until a budget is spent, from the pace of the last trials.

        The pace includes what the driver does between them. The longest gap is left out: a stage may lie in it.
        """
        left = self.trials - len(done)
        if self.evaluations is not None:
            left = min(left, self.evaluations - evaluations(done))
        recent = self.ends[-max(PACE, 4 * workers) - 1 :]
        gaps = [b - a for a, b in zip(recent, recent[1:], strict=False)]
        if len(gaps) > max(2, workers):  # else workers that end together leave gaps of 0
            each = (sum(gaps) - max(gaps)) / (len(gaps) - 1)
        else:
            each = statistics.median(t.seconds for t in done[-PACE:]) / workers
        return left * each if self.timeout is None else min(left * each, self.began + self.timeout - time.monotonic())


def evaluations(trials: Sequence[FinishedTrial]) -> int:
    """Return how many evaluations the trials took; a qconfig that was evaluated before takes none."""
    return sum(trial.outcome.tags.get("qflow.evaluated") != "false" for trial in trials)


def halted(driver: Driver | None) -> str:
    """Return why the sampler proposes nothing more although points are left: its mixes failed one after another."""
    if driver is None or driver.broken < FAILURES:
        return ""
    last = max(driver.failed.values(), key=lambda trial: trial.number)
    return f"ended early by {FAILURES} mixes in a row that failed, the last: {last.reason}"
