"""The goal, the objectives, and the choice of the best trial. A trial that lacks a measurement is never the best.

The objectives are a mapping of run metrics to directions. Among the trials that meet the goal, the best is the one with
the best objectives other than the accuracy, compared in the given order; of those that are equal, the one with the
fewest promoted operators, and then with the least drop. Without another objective the least drop comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeGuard

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.search.outcome import FinishedTrial

CONSTRAINT = "accuracy_drop"
MAXIMIZE, MINIMIZE = "maximize", "minimize"
Directions: TypeAlias = Mapping[str, str]  # run metric -> maximize or minimize, in order
LEAST_LATENCY: Directions = {"cost/latency_ms": MINIMIZE}

BUDGETS = {
    "max_latency_ms": "cost/latency_ms",
    "max_slowdown": "cost/slowdown",
    "max_int16_mac_share": "cost/int16_mac_share",
    "max_traffic_mb": "cost/traffic_mb",
}
"""Key of `objective` -> the run metric that it bounds."""
PROMOTED = ("qconfig/n_int16", "qconfig/n_int16_weights", "qconfig/n_float16")
DIGITS = 9  # metrics that differ only after so many decimals are equal: sums over operators in another order


@dataclass(frozen=True)
class Goal:
    """The largest drop against float, `max_drop` in units of the metric, and upper bounds of costs (None: no bound)."""

    max_drop: float
    max_latency_ms: float | None = None
    max_slowdown: float | None = None
    max_int16_mac_share: float | None = None
    max_traffic_mb: float | None = None
    optimize: Directions = field(default_factory=dict)
    """Empty until `aimed` fills it with the task's metric in its direction, and least latency."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.max_drop < math.inf:
            raise ConfigError(
                f"objective.max_drop is a number of at least 0, but got {self.max_drop:g}. 0.01 is usual."
            )
        for name, limit in self.budgets.items():
            if not 0.0 <= limit < math.inf:
                raise ConfigError(f"objective.{name} is a number of at least 0, but got {limit:g}. null sets no limit.")
        if self.max_slowdown is not None and self.max_slowdown < 1.0:
            raise ConfigError(
                f"objective.max_slowdown is a factor of at least 1, the latency of all-int8, but got "
                f"{self.max_slowdown:g}. 1.1 allows a tenth more; null sets no limit."
            )
        if (self.max_int16_mac_share or 0.0) > 1.0:
            raise ConfigError(
                f"objective.max_int16_mac_share is a share of at most 1, but got {self.max_int16_mac_share:g}."
            )
        for name, direction in self.optimize.items():
            if direction not in (MAXIMIZE, MINIMIZE):
                raise ConfigError(f"objective.optimize.{name} is maximize or minimize, but got {direction!r}.")

    def aimed(self, accuracy: str, direction: str, known: Sequence[str]) -> Goal:
        """Return the goal with `optimize` filled in. `accuracy` is the task's metric, `direction` maximize or minimize.

        Raises ConfigError for a metric that is not in `known`, the metrics of a run.
        """
        for name in self.optimize:
            if name not in known:
                raise ConfigError(
                    f"objective.optimize names metrics of a run, but got {name}.{did_you_mean(name, known)} There are: "
                    f"{', '.join(known)}."
                )
        return replace(self, optimize=self.optimize or {accuracy: direction, **LEAST_LATENCY})

    @property
    def ranking(self) -> Directions:
        """The objectives that rank the trials which meet the goal: all but the accuracy."""
        if not self.optimize:
            return LEAST_LATENCY
        return {name: way for name, way in self.optimize.items() if not name.startswith("accuracy/")}

    def objectives(self, metrics: Mapping[str, float]) -> tuple[float, ...]:
        """Return the objectives of a trial in the study's order. One that is missing is NaN, which fails the trial."""
        return tuple(metrics.get(name, math.nan) for name in self.optimize)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set."""
        return {name: limit for name in BUDGETS if (limit := getattr(self, name)) is not None}

    def excess(self, drop: float) -> float:
        """Return by how much `drop` exceeds the goal, rounded, so that a drop equal to the goal meets it."""
        return round(drop - self.max_drop, 9)

    def constraints(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return by how much the drop and each cost exceed their bounds. The goal is met if none is above 0."""
        over = {name: round(metrics[BUDGETS[name]] - limit, 9) for name, limit in self.budgets.items()}
        return {CONSTRAINT: self.excess(metrics["accuracy/drop"]), **over}

    def __str__(self) -> str:
        return ", ".join([f"drop of at most {self.max_drop:g}", *(f"{k} {v:g}" for k, v in self.budgets.items())])


def aims(goal: Goal) -> str:
    """Return the objectives as text: `most accuracy/map, least cost/latency_ms`."""
    words = {MAXIMIZE: "most", MINIMIZE: "least"}
    return ", ".join(f"{words[way]} {name}" for name, way in goal.optimize.items())


def over_budget(trial: FinishedTrial) -> dict[str, float]:
    """Return the budgets that the trial exceeds, and by how much."""
    return {name: by for name, by in trial.outcome.constraints.items() if name != CONSTRAINT and not by <= 0.0}


def accurate(trial: FinishedTrial | None) -> TypeGuard[FinishedTrial]:
    """Return whether the drop of the trial is known to meet the goal, whatever it costs. None, which failed, misses."""
    # NaN compares false: a missing drop misses
    return trial is not None and trial.outcome.constraints.get(CONSTRAINT, math.nan) <= 0.0


def meets(trial: FinishedTrial | None) -> TypeGuard[FinishedTrial]:
    """Return whether the trial is known to meet the goal, budgets included. None, which failed, misses."""
    return accurate(trial) and not over_budget(trial)


def best_trial(trials: Sequence[FinishedTrial], ranking: Directions = LEAST_LATENCY) -> FinishedTrial | None:
    """Return the best trial by `ranking` among those that meet the goal; `merit` says what breaks ties."""
    return min(filter(meets, trials), key=lambda t: merit(t, ranking), default=None)


def nearest_miss(trials: Sequence[FinishedTrial], ranking: Directions = LEAST_LATENCY) -> FinishedTrial | None:
    """Return the trial that comes closest to the goal, for a study in which none meets it.

    It is the one with the least drop among the trials within the budgets. If no trial is within the budgets, it is the
    best by `ranking` among the trials that are accurate enough. Trials that ended early count if there are no others.
    """
    known = [t for t in trials if CONSTRAINT in t.outcome.constraints]
    whole = [t for t in known if not t.stopped]
    return min(whole or known, key=lambda t: _nearness(t, ranking), default=None)


def ranked(trials: Sequence[FinishedTrial], ranking: Directions = LEAST_LATENCY) -> list[FinishedTrial]:
    """Return the trials in order: those that meet the goal, the best first, then the others, the nearest miss first."""
    met = sorted(filter(meets, trials), key=lambda t: merit(t, ranking))
    missed = [t for t in trials if not meets(t) and CONSTRAINT in t.outcome.constraints]
    return met + sorted(missed, key=lambda t: _nearness(t, ranking))


def _nearness(trial: FinishedTrial, ranking: Directions) -> tuple[float, ...]:
    """Return the key by which trials that miss the goal are ordered."""
    own = merit(trial, ranking)
    if over_budget(trial):
        return (1, 0, *own) if accurate(trial) else (1, 1, trial.outcome.constraints[CONSTRAINT], *own)
    return (0, trial.outcome.constraints[CONSTRAINT], *own)


def merit(trial: FinishedTrial, ranking: Directions) -> tuple[float, ...]:
    """Return the key by which trials are ordered, the best first.

    It consists of the ranked metrics, the number of promoted outputs and weights, the drop, and the age. Without ranked
    metrics accuracy is the only aim, so the drop comes first.
    """
    drop, promoted = trial.outcome.constraints[CONSTRAINT], promotions(trial)
    costs = [round(cost, DIGITS) for cost in _costs(trial, ranking)]
    return (*costs, promoted, drop, trial.number) if costs else (drop, promoted, trial.number)


def promotions(trial: FinishedTrial) -> float:
    """Return how many outputs and weights the trial has at int16 or fp16."""
    return sum(trial.outcome.metrics.get(name, 0.0) for name in PROMOTED)


def pareto_set(trials: Sequence[FinishedTrial], directions: Sequence[str]) -> list[FinishedTrial]:
    """Return the trials that no other dominates, that is, is at least as good in all objectives and better in one.

    Trials with equal objectives are all included; a trial with an unknown objective is not.
    """
    costs = {
        i: [_cost(v, way) for v, way in zip(t.outcome.objectives, directions, strict=True)]
        for i, t in enumerate(trials)
        if len(t.outcome.objectives) == len(directions) and not any(map(math.isnan, t.outcome.objectives))
    }
    front: list[int] = []
    for i in sorted(costs, key=lambda i: costs[i]):  # only an earlier one of this order can dominate
        last = front[-1:] if len(directions) == 2 else front  # of two costs it has the least second one so far
        if not any(dominates(costs[j], costs[i]) for j in last):
            front.append(i)
    return [trials[i] for i in sorted(front)]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether `one` is at most `other` in every cost and below it in one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def _costs(trial: FinishedTrial, ranking: Directions) -> tuple[float, ...]:
    """Return the ranked metrics as costs to minimize, in order; infinity for one that was not measured."""
    return tuple(_cost(trial.outcome.metrics.get(name, math.nan), way) for name, way in ranking.items())


def _cost(value: float, direction: str) -> float:
    return math.inf if math.isnan(value) else -value if direction == MAXIMIZE else value
