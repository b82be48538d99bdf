"""Strategies: which points to measure next, written as if they ran in one go.

    ladder    the guide's: the fewest promotions, most sensitive first, that meet the goal
    assign    per operator: the cheapest mix by predicted error, corrected by what was measured, bits given back
    halving   more and more training steps for fewer and fewer candidates

The contract: a strategy calls `measure(point, label)` and gets the finished trial, or None where it failed; a point
that the study has already costs nothing, so a search that was killed runs through its past again and goes on.
`measure` raises BudgetSpent when no further trial may start. A strategy is a deterministic function of what it
measured and ends by itself; the best trial is the study's (objective.best_trial), whatever it returns. Optuna's
samplers are the fourth strategy: the study's own `sample` (loop.py) until the budget is spent.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qflow.search.assign import Problem
from qflow.search.domain import Scalar, Values
from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial

STRATEGIES = ("optuna", "ratio", "assign")
RATIO, FLOAT16, ASSIGNMENT = "qconfig.int16_ratio", "qconfig.float16_count", "qconfig.assignment"
NARROW = 0.02  # a bracket of error budgets that differ by less holds nothing to find
REFINEMENTS = 8  # most mixes that the bracket of error budgets is narrowed by
BUDGETS = 64  # error budgets that candidates for the front are solved for

Measure = Callable[..., FinishedTrial | None]


class BudgetSpent(Exception):
    """No further trial may start: trials, evaluations or time are used up. The text says which."""


def meets(trial: FinishedTrial | None) -> bool:
    """True if the trial ran and is accurate enough; a failed one is a miss."""
    return trial is not None and accurate(trial)


def ladder(
    measure: Measure, base: Values, key: str, rungs: Sequence[Scalar], patience: int = 2
) -> FinishedTrial | None:
    """The lowest rung that meets the goal: 1, 2, 4, ... promotions until one does, then the half between.

    `rungs` rise from nothing promoted to everything; the first is known to miss (the floor). Accuracy need not be
    monotone: after the lowest rung with a miss right below, `patience` more below it are tried, nearest first.
    """
    at: dict[int, FinishedTrial | None] = {0: None}

    def ask(rung: int) -> bool:
        if rung not in at:
            at[rung] = measure({**base, key: rungs[rung]}, f"{key.split('.')[-1]}={_short(rungs[rung])}")
        return meets(at[rung])

    top, rung = len(rungs) - 1, 1
    while rung < top and not ask(rung):
        rung *= 2
    met = min(rung, top)
    if not ask(met):
        return None
    missed = max(r for r in at if r < met and not ask(r))
    while met - missed > 1:
        middle = (met + missed) // 2
        met, missed = (middle, missed) if ask(middle) else (met, middle)
    for below in [r for r in range(met - 2, 0, -1) if r not in at][:patience]:
        ask(below)
    return at[min(r for r in at if ask(r))]


def _short(value: Scalar) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def assign(
    measure: Measure,
    base: Values,
    problem: Problem,
    *,
    max_drop: float,
    int8_drop: float,
    int16_drop: float,
    max_ms: float | None = None,
    patience: int = 3,
    explore: bool = True,
) -> None:
    """The cheapest assignment that meets the goal, then bits given back, then the front around it.

    `int8_drop` and `int16_drop` are measured: they tie predicted errors to drops. `max_ms` is a time budget over all
    int8: the most accurate mix within it is measured once. `patience`: as many operators in a row that prove needed,
    least sensitive first, end the giving back. With `explore` the rest of the budget goes to the front.
    """
    seen: dict[str, FinishedTrial | None] = {}

    def ask(assignment: str, label: str) -> FinishedTrial | None:
        if assignment not in seen:
            seen[assignment] = measure({**base, ASSIGNMENT: assignment}, label)
        return seen[assignment]

    found = _bracket(ask, problem, max_drop, int8_drop, int16_drop)
    if max_ms is not None:
        ask(problem.most_accurate(max_ms), "within the time budget")
    if found is not None:
        give_back(ask, problem, found, patience)
    if explore:
        _explore(ask, problem, seen, {problem.all_int8: int8_drop, problem.all_int16: int16_drop})


def _bracket(
    ask: Callable[[str, str], FinishedTrial | None], problem: Problem, max_drop: float, drop8: float, drop16: float
) -> str | None:
    """The cheapest mix found to meet the goal: the error budget is narrowed between one that meets and one that misses.

    The next budget is where the drops measured at both ends say, kept off the ends.
    """
    low, high = problem.budget(0.0), problem.budget(1.0)  # met at `low`, missed at `high`
    low_drop, high_drop, best = drop16, max(drop8, max_drop), None
    for _ in range(REFINEMENTS):
        if high - low <= NARROW * (high - problem.budget(0.0)):
            break
        slope = (max_drop - low_drop) / (high_drop - low_drop) if high_drop > low_drop else 0.5
        budget = low + min(max(slope, 0.02), 0.8) * (high - low)
        mix = problem.cheapest(budget)
        if mix in (problem.all_int16, best):  # known to meet
            low = budget
            continue
        trial = ask(mix, f"assigned {mix.count('6')}")
        if meets(trial):
            assert trial is not None
            best, low, low_drop = mix, budget, min(trial.outcome.metrics["accuracy/drop"], max_drop)
        else:
            high = max(problem.error(mix), low)
            high_drop = max(trial.outcome.metrics["accuracy/drop"], max_drop) if trial else high_drop
    return best


def give_back(ask: Callable[[str, str], FinishedTrial | None], problem: Problem, mix: str, patience: int) -> str:
    """`mix` with operators put back to int8 where the goal still holds: halves of those left, least gain first."""
    left = sorted((i for i, letter in enumerate(mix) if letter == "6"), key=lambda i: problem.operators[i].gain)
    size, needed = max(len(left) // 2, 1), 0
    while left and needed < patience:
        group = left[:size]
        lower = "".join("8" if i in group else letter for i, letter in enumerate(mix))
        if lower == problem.all_int8:
            break
        if meets(ask(lower, f"given back {len(group)}")):
            mix, left, needed = lower, left[len(group) :], 0
        elif len(group) == 1:
            left, needed = left[1:], needed + 1
        else:
            size = len(group) // 2
            continue
        size = max(min(size, len(left)), 1)
    return mix


def _explore(
    ask: Callable[[str, str], FinishedTrial | None],
    problem: Problem,
    seen: Mapping[str, FinishedTrial | None],
    ends: Mapping[str, float],
) -> None:
    """Mixes for the front, again and again the one that is expected to add most to the area that it dominates.

    Candidates are the cheapest mixes over the whole range of error budgets, and single changes of mixes on the front.
    Drops are expected with optimism: errors of operators rarely add up on the front, where the cheapest of many mixes
    stand. Prices are guessed operator by operator until a mix comes first: a price takes longer than a guess.
    """
    budgets = [problem.budget((k / BUDGETS) ** 2) for k in range(1, BUDGETS)]
    solved = dict.fromkeys(problem.cheapest(budget) for budget in budgets)
    prices: dict[str, float] = {}
    while True:
        measured = {mix: trial.outcome.metrics["accuracy/drop"] for mix, trial in seen.items() if trial}
        landscape = _Landscape(problem, {**ends, **measured})
        expected = {mix: (landscape.drop(mix), landscape.guess(mix, problem.all_int8)) for mix in solved}
        for mix in landscape.front:
            for i, letter in enumerate(mix):
                other = mix[:i] + ("8" if letter == "6" else "6") + mix[i + 1 :]
                drop = landscape.drop(other, beside=mix)
                if other not in expected or drop < expected[other][0]:
                    expected[other] = drop, landscape.guess(other, mix)
        gains = {
            mix: landscape.gain(drop, prices.get(mix, guess))
            for mix, (drop, guess) in sorted(expected.items())
            if mix not in seen and mix not in ends
        }
        if not gains:
            return
        while (first := max(gains, key=gains.__getitem__)) not in prices:
            prices[first] = problem.price(first)
            gains[first] = landscape.gain(expected[first][0], prices[first])
        ask(first, "for the front")


class _Landscape:
    """What is measured: the front, and drops expected elsewhere from predicted errors, which rise with them."""

    def __init__(self, problem: Problem, drops: Mapping[str, float]) -> None:
        self.problem, self.drops = problem, drops
        known = sorted((problem.error(mix), drop) for mix, drop in drops.items())
        self.errors = [error for error, _ in known]
        self.levels = list(itertools.accumulate((drop for _, drop in known), max))
        self.worst = self.levels[-1], max(map(problem.price, (problem.all_int8, problem.all_int16)))
        self.front: list[str] = []
        for mix in sorted(self.drops, key=lambda m: (problem.price(m), self.drops[m], m)):
            if not self.front or self.drops[mix] < self.drops[self.front[-1]]:
                self.front.append(mix)
        self.points = [(drops[mix], problem.price(mix)) for mix in self.front]
        self.area = dominated_area(self.points, self.worst)

    def drop(self, mix: str, beside: str | None = None) -> float:
        """Expected drop by predicted error alone, or as a change of a measured mix: to int8 none, until measured."""
        if beside is None:
            return self._level(mix)
        return self.drops[beside] + min(self._level(mix) - self._level(beside), 0.0)

    def _level(self, mix: str) -> float:
        return float(np.interp(self.problem.error(mix), self.errors, self.levels))

    def guess(self, mix: str, beside: str) -> float:
        """Price of `mix` by that of another one and what each operator that differs costs."""
        pairs = zip(mix, beside, self.problem.operators, strict=True)
        changes = (o.int16_ms if one == "6" else -o.int16_ms for one, other, o in pairs if one != other)
        return self.problem.price(beside) + sum(changes)

    def gain(self, drop: float, price: float) -> tuple[float, float]:
        """Area that such a mix adds to the front's; among those that add none the nearest to the front."""
        added = dominated_area([*self.points, (drop, price)], self.worst) - self.area
        drops, prices = (worst or 1.0 for worst in self.worst)
        behind = min(max(drop - d, 0.0) / drops + max(price - p, 0.0) / prices for d, p in self.points)
        return added, -behind


def dominated_area(points: Sequence[tuple[float, float]], worst: tuple[float, float]) -> float:
    """Area that is dominated by points of two costs, up to `worst`."""
    area, top = 0.0, worst[1]
    for cost, price in sorted(points):
        if cost < worst[0] and price < top:
            area += (worst[0] - cost) * (top - price)
            top = price
    return area


def halving(measure: Measure, candidates: Sequence[Values], rungs: Sequence[int]) -> list[FinishedTrial]:
    """Train all `candidates` for `rungs[0]` steps, the half that lost least for `rungs[1]`, and so on.

    Returns the trials of the last rung, the best first. Rungs rise, so that checkpoints go on. A candidate that fails
    (diverges) is out.
    """
    alive, ranked = list(candidates), []
    for place, steps in enumerate(rungs):
        trials = [(measure({**point, "qat.steps": steps}, _trained(point, steps)), point) for point in alive]
        known = [(t, p) for t, p in trials if t is not None]
        ranked = sorted(known, key=lambda pair: pair[0].outcome.metrics["accuracy/drop"])
        keep = max(len(ranked) // 2, 1) if place + 1 < len(rungs) else len(ranked)
        alive = [point for _, point in ranked[:keep]]
    return [trial for trial, _ in ranked]


def _trained(point: Values, steps: int) -> str:
    said = {"learning_rate": "rate", "moving": "moving", "weight_decay": "decay"}
    words = [f"{word} {_short(point[f'qat.{k}'])}" for k, word in said.items() if f"qat.{k}" in point]
    return f"QAT {steps} steps {', '.join(words)}".rstrip()
