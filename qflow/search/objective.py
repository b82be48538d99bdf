"""The goal, and which trial is best: plain numbers. An absent measurement never wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qflow.core.errors import ConfigError
from qflow.search.outcome import FinishedTrial

CONSTRAINT = "accuracy_drop"


BUDGETS = {
    "max_latency_ms": "cost/latency_ms",
    "max_int16_mac_share": "cost/int16_mac_share",
    "max_traffic_mb": "cost/traffic_mb",
}
"""Key of `objective` -> the metric that it bounds."""


@dataclass(frozen=True)
class Goal:
    """Lose at most `max_drop` against float, in the metric's own units, within every budget that is not None."""

    max_drop: float
    max_latency_ms: float | None = None
    max_int16_mac_share: float | None = None
    max_traffic_mb: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < math.inf:
            raise ConfigError(
                f"objective.max_drop is a number of at least 0, but got {self.max_drop:g}. 0.01 is usual."
            )
        for name, limit in self.budgets.items():
            if not 0.0 <= limit < math.inf:
                raise ConfigError(f"objective.{name} is a number of at least 0, but got {limit:g}. null sets no limit.")

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set."""
        return {name: limit for name in BUDGETS if (limit := getattr(self, name)) is not None}

    def excess(self, drop: float) -> float:
        """How far `drop` exceeds the goal; <= 0 meets it. Rounded, so that equality on paper is equality here."""
        return round(drop - self.max_drop, 9)

    def constraints(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What must be at most 0 for the goal to be met: the drop's excess, and that of each budget."""
        over = {name: round(metrics[BUDGETS[name]] - limit, 9) for name, limit in self.budgets.items()}
        return {CONSTRAINT: self.excess(metrics["accuracy/drop"]), **over}

    def __str__(self) -> str:
        return ", ".join([f"drop of at most {self.max_drop:g}", *(f"{k} {v:g}" for k, v in self.budgets.items())])


def over_budget(trial: FinishedTrial) -> dict[str, float]:
    """Budgets that the trial exceeds, and by how much."""
    return {name: by for name, by in trial.outcome.constraints.items() if name != CONSTRAINT and not by <= 0.0}


def accurate(trial: FinishedTrial) -> bool:
    """True if the trial is known to lose no more than the goal allows, whatever it costs."""
    return trial.outcome.constraints.get(CONSTRAINT, math.nan) <= 0.0  # NaN compares false: absent is failed


def meets(trial: FinishedTrial) -> bool:
    """True if the trial is known to meet the goal, budgets included."""
    return accurate(trial) and not over_budget(trial)


def best_trial(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """Least latency among the trials that meet the goal; ties by smaller excess drop, then by age."""
    met = [t for t in trials if meets(t)]
    return min(met, key=lambda t: (t.outcome.objectives[1], t.outcome.constraints[CONSTRAINT], t.number), default=None)


def nearest_miss(trials: Sequence[FinishedTrial]) -> FinishedTrial | None:
    """The trial that comes closest to the goal, when none meets it: the least drop of those within the budgets; the
    cheapest of the accurate ones where no budget can be kept.
    """
    known = [t for t in trials if CONSTRAINT in t.outcome.constraints]
    within = [t for t in known if not over_budget(t)]
    if not within and any(map(accurate, known)):
        return min(filter(accurate, known), key=lambda t: t.outcome.objectives[1])
    return min(
        within or known, key=lambda t: (t.outcome.constraints[CONSTRAINT], t.outcome.objectives[1]), default=None
    )
