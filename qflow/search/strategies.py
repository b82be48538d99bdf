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

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias

from qflow.search.assign import Problem
from qflow.search.domain import Scalar, Values
from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.surrogate import Surrogate

STRATEGIES = ("optuna", "ratio", "assign")
RATIO, FLOAT16, ASSIGNMENT = "qconfig.int16_ratio", "qconfig.float16_count", "qconfig.assignment"
ERROR_SHARE = "qconfig.error_share"
NARROW = 0.02  # a bracket of error budgets that differ by less holds nothing to find
REFINEMENTS = 8  # most mixes that the bracket of error budgets is narrowed by
BUDGETS = 64  # error budgets that candidates for the front are solved for
SAME_MS = 1e-9  # times that differ by less are equal

Measure = Callable[..., FinishedTrial | None]
Ask: TypeAlias = Callable[[str, str], FinishedTrial | None]
"""Measure a mix, with a label."""


class BudgetSpent(Exception):
    """No further trial may start: trials, evaluations or time are used up. The text says which."""


def meets(trial: FinishedTrial | None) -> bool:
    """True if the trial ran and is accurate enough; a failed one is a miss."""
    return trial is not None and accurate(trial)


def raise_until_met(
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

    if len(rungs) < 2:
        return None
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
    patience: int = 3,
    explore: bool = True,
) -> None:
    """The cheapest assignment that meets the goal, then bits given back, then the front around it.

    Nothing is measured that exceeds a limit of the problem. `int8_drop` and `int16_drop` are measured: they tie
    predicted errors to drops. `patience`: as many operators in a row that prove needed, least sensitive first, end
    the giving back. With `explore` the rest of the budget goes to the front.
    """
    ends = {problem.all_int8: int8_drop, problem.all_int16: int16_drop}
    seen: dict[str, FinishedTrial | None] = {}

    def ask(mix: str, label: str) -> FinishedTrial | None:
        if mix not in seen:
            seen[mix] = measure({**base, ASSIGNMENT: mix}, label)
        return seen[mix]

    found = _bracket(ask, problem, max_drop, ends)
    if found is not None:
        demote(ask, problem, found, patience, missed=[problem.all_int8])
    if explore:
        _explore(ask, problem, seen, ends)


def _bracket(ask: Ask, problem: Problem, max_drop: float, ends: Mapping[str, float]) -> str | None:
    """The cheapest mix found to meet the goal: the error budget is narrowed between one that meets and one that misses.

    The next budget is where the drops measured at both ends say, kept off the ends. Where the limits bar all int16,
    the most accurate mix within them takes its place.
    """
    top, best = problem.all_int16, None
    low_drop, high_drop = ends[top], max(ends[problem.all_int8], max_drop)
    if not problem.within(top):
        top = problem.most_accurate()
        trial = None if top in ends else ask(top, "most accurate within the limits")
        if trial is None or not meets(trial):
            return None
        best, low_drop = top, _drop(trial)
    low, high = problem.error(top), problem.budget(1.0)  # met at `low`, missed at `high`
    least = low
    for _ in range(REFINEMENTS):
        if high - low <= NARROW * (high - least):
            break
        slope = (max_drop - low_drop) / (high_drop - low_drop) if high_drop > low_drop else 0.5
        budget = low + min(max(slope, 0.02), 0.8) * (high - low)
        mix = problem.cheapest(budget)
        if mix in (top, best):  # known to meet
            low = budget
            continue
        trial = ask(mix, f"assigned {mix.count('6')}")
        if trial is not None and meets(trial):
            best, low, low_drop = mix, budget, min(_drop(trial), max_drop)
        else:
            high = max(problem.error(mix), low)
            high_drop = max(_drop(trial), max_drop) if trial else high_drop
    return best


def _drop(trial: FinishedTrial) -> float:
    return trial.outcome.metrics["accuracy/drop"]


def demote(ask: Ask, problem: Problem, mix: str, patience: int, missed: Collection[str] = ()) -> str:
    """`mix` with operators put back to int8 where the goal still holds: all of them, then halves of those left, least
    gain first.

    `missed` are mixes that are known to miss: all int8, unless it is to be tried. What would exceed a limit or take
    longer is not asked for. `patience` operators in a row that prove needed end it.
    """
    gains = {o.place: o.gain for o in problem.operators}
    left = sorted((i for i in gains if mix[i] == "6"), key=gains.__getitem__)
    size, needed, known = len(left), 0, set(missed)
    while left and needed < patience:
        group = left[:size]
        lower = "".join("8" if i in group else letter for i, letter in enumerate(mix))
        worth = problem.price(lower) <= problem.price(mix) + SAME_MS and problem.within(lower)
        if worth and lower not in known and meets(ask(lower, f"given back {len(group)}")):
            mix, left, needed = lower, left[len(group) :], 0
            size = max(min(size, len(left)), 1)
        elif len(group) > 1:
            size = len(group) // 2
            known.add(lower)
        else:
            left, needed, size = left[1:], needed + int(worth), 1
    return mix


def _explore(ask: Ask, problem: Problem, seen: Mapping[str, FinishedTrial | None], ends: Mapping[str, float]) -> None:
    """Mixes for the front, again and again the one that is expected to add most to the area that it dominates.

    Candidates are the cheapest mixes over the whole range of error budgets, and single changes of mixes on the front.
    """
    budgets = [problem.budget((k / BUDGETS) ** 2) for k in range(1, BUDGETS)]
    solved = list(dict.fromkeys(problem.cheapest(budget) for budget in budgets))
    while True:
        land = Surrogate(problem, {**ends, **{mix: _drop(trial) for mix, trial in seen.items() if trial}})
        expected = {m: drop for m, drop in sorted(land.expected(solved).items()) if m not in seen and m not in ends}
        prices = problem.time.estimates(list(expected))
        gains = {m: land.gain(drop, float(ms)) for (m, drop), ms in zip(expected.items(), prices, strict=True)}
        promising = (m for m in sorted(gains, key=gains.__getitem__, reverse=True) if problem.within(m))
        first = next(promising, None)
        if first is None:
            return
        ask(first, "for the front")


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
