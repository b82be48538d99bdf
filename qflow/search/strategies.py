"""Strategies: which points to measure next, written as if they ran in one go.

    ladder    the guide's: the fewest promotions, most sensitive first, that meet the goal
    assign    per operator: the cheapest mix by predicted error, corrected by what was measured, bits given back
    halving   more and more training steps for fewer and fewer candidates

The contract: a strategy calls `measure(point, label)` and gets the finished trial, or None where it failed; a point
that the study has already costs nothing, so a search that was killed runs through its past again and goes on.
`measure` raises BudgetSpent when no further trial may start. A strategy is a deterministic function of what it
measured, ends by itself, and returns nothing: the best trial is the study's (objective.best_trial). Optuna's
samplers are the fourth strategy: the study's own `sample` (loop.py) until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qflow.core.errors import ConfigError
from qflow.search.assign import Problem
from qflow.search.domain import Scalar, Values
from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial

STRATEGIES = ("optuna", "ratio", "assign")
ASSIGNMENT = "qconfig.assignment"
NARROW = 0.02  # a bracket of error budgets that differ by less holds nothing to find
REFINEMENTS = 8  # most mixes that the bracket of error budgets is narrowed by

Measure = Callable[..., FinishedTrial | None]


class BudgetSpent(Exception):
    """No further trial may start: trials, evaluations or time are used up. The text says which."""


def meets(trial: FinishedTrial | None) -> bool:
    """True if the trial ran and is accurate enough; a failed one is a miss."""
    return trial is not None and accurate(trial)


def ladder(measure: Measure, base: Values, key: str, rungs: Sequence[Scalar], patience: int = 2) -> None:
    """The lowest rung that meets the goal: 1, 2, 4, ... promotions until one does, then the half between.

    `rungs` rise from nothing promoted to everything; the first is known to miss (the floor). Accuracy need not be
    monotone: after the lowest rung with a miss right below, `patience` more below it are tried, nearest first.
    """
    at: dict[int, bool] = {0: False}

    def ask(rung: int) -> bool:
        if rung not in at:
            at[rung] = meets(measure({**base, key: rungs[rung]}, f"{key.split('.')[-1]}={_short(rungs[rung])}"))
        return at[rung]

    top, rung = len(rungs) - 1, 1
    while rung < top and not ask(rung):
        rung *= 2
    met = min(rung, top)
    if not ask(met):
        return
    missed = max(r for r, ok in at.items() if not ok and r < met)
    while met - missed > 1:
        middle = (met + missed) // 2
        met, missed = (middle, missed) if ask(middle) else (met, middle)
    for below in [r for r in range(met - 2, 0, -1) if r not in at][:patience]:
        ask(below)


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
        found = give_back(ask, problem, found, patience)
    if explore:
        _explore(ask, problem, found, seen)


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
    best: str | None,
    seen: Mapping[str, Any],
) -> None:
    """Mixes for the front: error budgets in the widest gaps first, then single changes of what is on the front."""
    shares = [0.5]
    step = 0.25
    while step > 1e-3:  # 1/2, then quarters, eighths, ...: the whole range at any time
        shares += [step * k for k in range(1, round(1 / step), 2)]
        step /= 2
    wanted = list(dict.fromkeys(problem.cheapest(problem.budget(share**2)) for share in shares[:63]))
    for mix in wanted:
        if mix not in seen and mix not in (problem.all_int8, problem.all_int16):
            ask(mix, f"assigned {mix.count('6')}")
    while True:
        front = _measured_front(problem, seen)
        neighbours = {
            mix[:i] + ("8" if mix[i] == "6" else "6") + mix[i + 1 :] for mix in front for i in range(len(mix))
        } - {problem.all_int8, problem.all_int16, *seen}
        if not neighbours:
            return
        ask(min(sorted(neighbours), key=lambda m: _merit(problem, m)), "beside the front")


def _measured_front(problem: Problem, seen: Mapping[str, FinishedTrial | None]) -> list[str]:
    known = sorted(
        (problem.price(mix), trial.outcome.metrics["accuracy/drop"], mix) for mix, trial in seen.items() if trial
    )
    front: list[tuple[float, float, str]] = []
    for entry in known:
        if not front or entry[1] < front[-1][1]:
            front.append(entry)
    return [mix for _, _, mix in front]


def _merit(problem: Problem, mix: str) -> float:
    """How far a mix lies above the line of predicted error against time that its like are on; lower is better."""
    span = problem.budget(1.0) - problem.budget(0.0) or 1.0
    least, most = problem.price(problem.all_int8), problem.price(problem.all_int16)
    return (problem.error(mix) - problem.budget(0.0)) / span + (problem.price(mix) - least) / ((most - least) or 1.0)


def halving(measure: Measure, candidates: Sequence[Values], rungs: Sequence[int], metric: str, sign: float) -> None:
    """Train all `candidates` for `rungs[0]` steps, the better half for `rungs[1]`, and so on; checkpoints go on.

    `sign` is 1 where a larger `metric` is better, else -1. A candidate that fails (diverges) is out. Raises
    ConfigError for rungs that do not rise.
    """
    if list(rungs) != sorted(set(rungs)) or not rungs:
        raise ConfigError(f"Steps rise from rung to rung, but got {list(rungs)}. Mend search.qat.rungs.")
    alive = list(candidates)
    for place, steps in enumerate(rungs):
        trials = [(measure({**point, "qat.steps": steps}, _trained(point, steps)), point) for point in alive]
        ranked = sorted(
            ((t, p) for t, p in trials if t is not None), key=lambda pair: -sign * pair[0].outcome.metrics[metric]
        )
        keep = max(len(ranked) // 2, 1) if place + 1 < len(rungs) else len(ranked)
        alive = [point for _, point in ranked[:keep]]


def _trained(point: Values, steps: int) -> str:
    said = {"learning_rate": "rate", "moving": "moving", "weight_decay": "decay"}
    words = [f"{word} {_short(point[f'qat.{k}'])}" for k, word in said.items() if f"qat.{k}" in point]
    return f"QAT {steps} steps {', '.join(words)}".rstrip()
