"""What a study may still spend: trials, evaluations and time; and what of it is left for training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from qflow.search.outcome import FinishedTrial
from qflow.search.strategies import BudgetSpent


@dataclass
class Budget:
    """`search.n_trials`, `search.max_evaluations` and `search.timeout` (seconds from now on) of a study."""

    trials: int
    evaluations: int | None = None
    timeout: float | None = None
    reserved: int = 0
    """Trials (and evaluations) left for training while nothing meets the goal, at most half of those of the search."""
    began: float = field(default_factory=time.monotonic)

    def require(self, done: Sequence[FinishedTrial], met: bool) -> None:
        """Raises BudgetSpent where no further trial may start; `met` says that training will not be needed."""
        counts = [("trials", len(done), self.trials, "search.n_trials")]
        if self.evaluations is not None:
            counts.append(("evaluations", evaluations(done), self.evaluations, "search.max_evaluations"))
        for what, spent, limit, key in counts:
            held = 0 if met else min(self.reserved, max(limit - 2, 0) // 2)
            if spent >= limit - held:
                left = f", {limit - spent} are left for training" if held else ""
                raise BudgetSpent(f"{spent} of {limit} {what} are run ({key}){left}")
        if self.timeout is not None and time.monotonic() - self.began >= self.timeout:
            raise BudgetSpent(f"{self.timeout:g} s have passed (search.timeout)")

    def seconds_left(self, done: Sequence[FinishedTrial]) -> float:
        """Until the first budget is spent, if the next trials take as long as the last ones."""
        left = self.trials - len(done)
        if self.evaluations is not None:
            left = min(left, self.evaluations - evaluations(done))
        seconds: float = statistics.median(t.seconds for t in done[-8:]) * left
        return seconds if self.timeout is None else min(seconds, self.began + self.timeout - time.monotonic())


def evaluations(trials: Sequence[FinishedTrial]) -> int:
    """Evaluations that trials took; a qconfig that was evaluated before takes none."""
    return sum(trial.outcome.tags.get("qflow.evaluated") != "false" for trial in trials)
