"""The goal, what is optimized, and which trial is best: plain numbers. An absent measurement never wins.

What is optimized is a mapping of run metrics to directions. Of the trials that meet the goal the best has the best of
the objectives other than the accuracy, in the given order, then the least drop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from qflow.core.errors import ConfigError
from qflow.search.outcome import FinishedTrial

CONSTRAINT = "accuracy_drop"
MAXIMIZE, MINIMIZE = "maximize", "minimize"
Directions: TypeAlias = Mapping[str, str]  # run metric -> maximize or minimize, in order
LEAST_LATENCY: Directions = {"cost/latency_ms": MINIMIZE}

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
    optimize: Directions = field(default_factory=dict)
    """Empty until `aimed` fills it: the task's metric in its direction, and the least latency."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < math.inf:
            raise ConfigError(
                f"objective.max_drop is a number of at least 0, but got {self.max_drop:g}. 0.01 is usual."
            )
        for name, limit in self.budgets.items():
            if not 0.0 <= limit < math.inf:
                raise ConfigError(f"objective.{name} is a number of at least 0, but got {limit:g}. null sets no limit.")
        if (self.max_int16_mac_share or 0.0) > 1.0:
            raise ConfigError(
                f"objective.max_int16_mac_share is a share of at most 1, but got {self.max_int16_mac_share:g}."
            )
        for name, direction in self.optimize.items():
            if direction not in (MAXIMIZE, MINIMIZE):
                raise ConfigError(f"objective.optimize.{name} is maximize or minimize, but got {direction!r}.")

    def aimed(self, accuracy: str, direction: str, known: Sequence[str]) -> Goal:
        """The goal with `optimize` filled in, for a task whose metric `accuracy` is to be `direction`d.

        Raises ConfigError for a metric that is not among `known`, those of a run.
        """
        for name in self.optimize:
            if name not in known:
                raise ConfigError(
                    f"objective.optimize names metrics of a run, but got {name}. There are: {', '.join(known)}."
                )
        return replace(self, optimize=self.optimize or {accuracy: direction, **LEAST_LATENCY})

    @property
    def ranking(self) -> Directions:
        """What ranks the trials that meet the goal: the objectives other than the accuracy."""
        if not self.optimize:
            return LEAST_LATENCY
        return {name: way for name, way in self.optimize.items() if not name.startswith("accuracy/")}

    def objectives(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """The objectives of a trial in the study's order; NaN, which fails the trial, for one that it does not have."""
        return tuple(metrics.get(name, math.nan) for name in self.optimize)

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


def aims(goal: Goal) -> str:
    """What is optimized, for people: `most accuracy/map, least cost/latency_ms`."""
    words = {MAXIMIZE: "most", MINIMIZE: "least"}
    return ", ".join(f"{words[way]} {name}" for name, way in goal.optimize.items())


def over_budget(trial: FinishedTrial) -> dict[str, float]:
    """Budgets that the trial exceeds, and by how much."""
    return {name: by for name, by in trial.outcome.constraints.items() if name != CONSTRAINT and not by <= 0.0}


def accurate(trial: FinishedTrial) -> bool:
    """True if the trial is known to lose no more than the goal allows, whatever it costs."""
    return trial.outcome.constraints.get(CONSTRAINT, math.nan) <= 0.0  # NaN compares false: absent is failed


def meets(trial: FinishedTrial) -> bool:
    """True if the trial is known to meet the goal, budgets included."""
    return accurate(trial) and not over_budget(trial)


def best_trial(trials: Sequence[FinishedTrial], ranking: Directions = LEAST_LATENCY) -> FinishedTrial | None:
    """The best by `ranking` among the trials that meet the goal; ties by smaller excess drop, then by age."""
    met = [t for t in trials if meets(t)]
    return min(met, key=lambda t: (*_costs(t, ranking), t.outcome.constraints[CONSTRAINT], t.number), default=None)


def nearest_miss(trials: Sequence[FinishedTrial], ranking: Directions = LEAST_LATENCY) -> FinishedTrial | None:
    """The trial that comes closest to the goal, when none meets it: the least drop of those within the budgets; the
    best by `ranking` of the accurate ones where no budget can be kept.
    """
    known = [t for t in trials if CONSTRAINT in t.outcome.constraints]
    within = [t for t in known if not over_budget(t)]
    if not within and any(map(accurate, known)):
        return min(filter(accurate, known), key=lambda t: (*_costs(t, ranking), t.outcome.constraints[CONSTRAINT]))
    return min(within or known, key=lambda t: (t.outcome.constraints[CONSTRAINT], *_costs(t, ranking)), default=None)


def pareto_set(trials: Sequence[FinishedTrial], directions: Sequence[str]) -> list[FinishedTrial]:
    """Trials whose objectives no other trial dominates: none is at least as good in all and better in one.

    Trials with the same objectives stand together; one with an objective that is not known is not among them.
    """
    costs = {
        i: [_cost(v, way) for v, way in zip(t.outcome.objectives, directions, strict=True)]
        for i, t in enumerate(trials)
        if len(t.outcome.objectives) == len(directions) and not any(map(math.isnan, t.outcome.objectives))
    }
    return [trials[i] for i, mine in costs.items() if not any(dominates(other, mine) for other in costs.values())]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is at most `other` in every cost and below it in one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def _costs(trial: FinishedTrial, ranking: Directions) -> tuple[float, ...]:
    """What is to be least, in order; infinity for what was not measured."""
    return tuple(_cost(trial.outcome.metrics.get(name, math.nan), way) for name, way in ranking.items())


def _cost(value: float, direction: str) -> float:
    return math.inf if math.isnan(value) else -value if direction == MAXIMIZE else value
