"""The goal, and which trial is best: plain numbers. An absent measurement never wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qflow.core.errors import ConfigError
from qflow.search.outcome import FinishedTrial

CONSTRAINT = "accuracy_drop"


@dataclass(frozen=True)
class Goal:
    """Lose at most `max_drop` against float, in the metric's own units."""

    max_drop: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < math.inf:
            raise ConfigError(
                f"objective.max_drop is a number of at least 0, but got {self.max_drop:g}. 0.01 is usual."
            )

    def excess(self, drop: float) -> float:
        """How far `drop` exceeds the goal; <= 0 meets it. Rounded, so that equality on paper is equality here."""
        return round(drop - self.max_drop, 9)


def meets(trial: FinishedTrial) -> bool:
    """True if the trial is known to meet the goal."""
    excess = trial.outcome.constraints.get(CONSTRAINT, math.nan)
    return excess <= 0.0  # NaN compares false: absent is failed


def best_trial(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """Least latency among the trials that meet the goal; ties by smaller excess drop, then by age."""
    met = [t for t in trials if meets(t)]
    return min(met, key=lambda t: (t.outcome.objectives[1], t.outcome.constraints[CONSTRAINT], t.number), default=None)


def nearest_miss(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """The trial that comes closest to the goal, when none meets it."""
    known = [t for t in trials if CONSTRAINT in t.outcome.constraints]
    return min(known, key=lambda t: (t.outcome.constraints[CONSTRAINT], t.outcome.objectives[1]), default=None)
