"""The budget of a study: trials, evaluations and time, and the part that is reserved for training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent


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
        """Estimate the seconds until a budget is spent, from the duration of the last trials."""
        left = self.trials - len(done)
        if self.evaluations is not None:
            left = min(left, self.evaluations - evaluations(done))
        seconds: float = statistics.median(t.seconds for t in done[-8:]) * left / workers
        return seconds if self.timeout is None else min(seconds, self.began + self.timeout - time.monotonic())


def evaluations(trials: Sequence[FinishedTrial]) -> int:
    """Return how many evaluations the trials took; a qconfig that was evaluated before takes none."""
    return sum(trial.outcome.tags.get("qflow.evaluated") != "false" for trial in trials)
