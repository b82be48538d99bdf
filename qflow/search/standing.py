"""The best trial and the Pareto set of a study, renewed by each trial that is added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from qflow.search.objective import LEAST_LATENCY, Directions, best_trial, pareto_set
from qflow.search.outcome import FinishedTrial


@dataclass
class Standing:
    """What `best_trial` and `pareto_set` give for all trials that were seen.

    A trial that was the best, or in the front, before others came can lose that place, but none can win it back: so
    only new trials are compared with these, and a study of thousands takes no longer for each than one of ten.
    """

    ranking: Directions = field(default_factory=lambda: LEAST_LATENCY)
    ways: Sequence[str] = ()
    """Directions of the objectives, in the study's order."""
    best: FinishedTrial | None = None
    front: list[FinishedTrial] = field(default_factory=list)
    """The Pareto set, by number."""
    _seen: set[tuple[int, str]] = field(default_factory=set)  # number and run

    def after(self, trials: Iterable[FinishedTrial]) -> Standing:
        """Take in those of `trials` that are new, or whose run has been made since; return this object."""
        new = [trial for trial in trials if (trial.number, trial.run_id) not in self._seen]
        if new:
            self._seen.update((trial.number, trial.run_id) for trial in new)
            numbers = {trial.number for trial in new}
            best = [self.best] if self.best and self.best.number not in numbers else []
            self.best = best_trial([*best, *new], self.ranking)
            front = [trial for trial in self.front if trial.number not in numbers]
            among = sorted([*front, *new], key=lambda trial: trial.number)
            self.front = pareto_set(among, self.ways) if self.ways else []
        return self
