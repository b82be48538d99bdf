"""The search strategies: each chooses which points to measure next.

    raise_until_met   the guide's method: the fewest promotions, most sensitive first, that meet the goal
    assign            the cheapest mix, operator by operator, by predicted errors that measurements correct;
                      then demotion of int16 operators that are not needed
    halving           more and more training steps for fewer and fewer candidates

All strategies keep one contract. A strategy calls `measure(point, label)`, which returns the finished trial, or None if
the trial failed. A point that the study has measured before costs nothing, so a search that was killed repeats its past
calls at no cost and continues. `measure` raises BudgetSpent if no further trial may start. A strategy is a
deterministic function of its measurements and ends by itself. The best trial of a study is `objective.best_trial`,
whatever a strategy returns. Optuna's samplers are a further strategy: `Driver.sample` (loop.py) until the budget is
spent. After `assign` they propose the settings around its mixes (study/mix_inside.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from qflow.search.assign import Problem
from qflow.search.domain import Scalar, Values
from qflow.search.next_mix import NextMix
from qflow.search.objective import accurate
from qflow.search.outcome import FinishedTrial
from qflow.search.surrogate import Measurement

STRATEGIES = ("optuna", "ratio", "assign")
RATIO, FLOAT16, ASSIGNMENT = "qconfig.int16_ratio", "qconfig.float16_count", "qconfig.assignment"
ERROR_SHARE, SENSITIVE_TYPE = "qconfig.error_share", "qconfig.sensitive_type"
DEMOTED = "demoted"  # how the label of a trial with fewer promotions than one before begins
SAME_MS = 1e-9  # times that differ by less count as equal

T = TypeVar("T")
Measure = Callable[..., FinishedTrial | None]
Ask: TypeAlias = Callable[[str, str], FinishedTrial | None]
"""Measures the mix (first argument) in a trial with the label (second argument)."""


def _none(_: Sequence[tuple[Values, str]]) -> None:
    pass


@dataclass(frozen=True)
class AtOnce:
    """Measures points, given with their labels, before the strategy asks for each by `measure`.

    With one worker it does nothing, and a strategy measures one point after another. With more, a strategy looks ahead:
    it hands over points that do not need each other's results, or that it may need next, as many as there are workers.
    """

    workers: int = 1
    measure_all: Callable[[Sequence[tuple[Values, str]]], None] = _none

    def __call__(self, points: Sequence[tuple[Values, str]]) -> None:
        """Measure the points at once, as far as the budget has room for them."""
        if self.workers > 1 and len(points) > 1:
            self.measure_all(points)


ALONE = AtOnce()


class BudgetSpent(Exception):
    """No further trial may start, because trials, evaluations or time are used up; the text names which."""


def raise_until_met(
    measure: Measure, base: Values, key: str, values: Sequence[Scalar], patience: int = 2, at_once: AtOnce = ALONE
) -> FinishedTrial | None:
    """Return the trial at the lowest of `values` of `key` that is found to meet the goal, or None.

    `values` ascend, one promotion more each, from none to all; the first is known to miss the goal. The values after 1,
    2, 4, ... promotions are measured until one meets the goal, then the count is bisected. Because accuracy need not
    rise with every promotion, up to `patience` more values below the result are tried, nearest first.

    With k workers, k of the counts 1, 2, 4, ... are measured at once, then k counts that divide what is left evenly.
    """
    trials: dict[int, FinishedTrial | None] = {0: None}  # by number of promotions

    def at(count: int) -> tuple[Values, str]:
        return {**base, key: values[count]}, f"{key.split('.')[-1]}={_short(values[count])}"

    def ask(count: int) -> bool:
        if count not in trials:
            trials[count] = measure(*at(count))
        return accurate(trials[count])

    def ahead(counts: Sequence[int]) -> Sequence[int]:
        at_once([at(count) for count in counts if count not in trials])
        return counts

    if len(values) < 2:
        return None
    most, workers = len(values) - 1, at_once.workers
    doubled = [*(2**i for i in range((most - 1).bit_length())), most]
    rounds = [doubled[i : i + workers] for i in range(0, len(doubled), workers)]
    met = next((count for counts in rounds for count in ahead(counts) if ask(count)), None)
    if met is None:
        return None
    missed = max(n for n in trials if n < met and not ask(n))
    while met - missed > 1:
        parts = min(workers + 1, met - missed)
        middle = [missed + (met - missed) * i // parts for i in range(1, parts)]
        for count in ahead(middle):
            if ask(count):
                met = count
                break
            missed = count
    for below in ahead([n for n in range(met - 2, 0, -1) if n not in trials][:patience]):
        ask(below)
    return trials[min(n for n in trials if ask(n))]


def _short(value: Scalar) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower()


def assign(
    measure: Measure,
    base: Values,
    problem: Problem,
    *,
    max_drop: float,
    int8_drop: float | None,
    int16_drop: float,
    top: str = "",
    patience: int = 3,
    explore: bool = True,
    at_once: AtOnce = ALONE,
) -> None:
    """Search the cheapest assignment that meets the goal, and demote what it does not need.

    Each mix is the one that is most worth a trial, given all drops measured so far (next_mix.py). None is measured that
    exceeds a limit of the problem. With `explore` the Pareto front of drop against latency is worth trials as well, and
    demotion comes last. `int8_drop` and `int16_drop` are the measured drops of the baselines; they relate predicted
    errors to drops. `int8_drop` is None if the outputs of all int8 are not finite. `top` is the mix of `int16_drop`,
    which is known to meet the goal, if that is not all int16 but has int16 weights. Demotion ends after `patience`
    operators in a row that prove needed. With k workers, k mixes are chosen and measured at once; demotion measures one
    mix after another, because each starts from the one before.
    """
    top = top or problem.all_int16
    measured = {problem.all_int8: int8_drop, top: int16_drop}
    ends = {mix: drop for mix, drop in measured.items() if drop is not None}
    seen: dict[str, FinishedTrial | None] = {mix: None for mix in measured if mix not in ends}
    high = max(max_drop, int16_drop) if int8_drop is None else int8_drop
    chosen = NextMix(problem, max_drop, int16_drop, high)

    def ask(mix: str, label: str) -> FinishedTrial | None:
        if mix not in seen:
            seen[mix] = measure({**base, ASSIGNMENT: mix}, label)
        return seen[mix]

    def known() -> list[Measurement]:
        drops = {**ends, **{mix: _drop(trial) for mix, trial in seen.items() if trial}}
        return [Measurement(mix, drop) for mix, drop in drops.items()]

    first = top if problem.within(top) else problem.most_accurate()
    known_to_meet = first in ends or accurate(ask(first, "most accurate within the limits"))
    found = first if known_to_meet else None
    while (found or explore) and (mixes := chosen.choose_all(known(), {*ends, *seen}, at_once.workers, front=explore)):
        labels = {mix: f"assigned {mix.count('6')}" for mix in mixes}
        at_once([({**base, ASSIGNMENT: mix}, label) for mix, label in labels.items()])
        met = [mix for mix, label in labels.items() if accurate(ask(mix, label))]
        found = min([*([found] if found else []), *met], key=problem.price, default=None)
    if found and found != top:
        demote(ask, problem, found, patience, missed=[problem.all_int8])


def _drop(trial: FinishedTrial) -> float:
    return trial.outcome.metrics["accuracy/drop"]


def demote(ask: Ask, problem: Problem, mix: str, patience: int, missed: Collection[str] = ()) -> str:
    """Return `mix` with int16 operators demoted to int8 as long as the goal is met.

    Groups are demoted in order of rising gain: first all operators together, then half of a group that proves needed.
    `missed` holds mixes that are known to miss the goal (all int8, unless it is to be tried). A mix that would exceed a
    limit or take longer is not measured. Demotion ends after `patience` single operators in a row that prove needed.
    """
    gains = {o.place: o.gain for o in problem.operators}
    known = set(missed)

    def lowered(group: Sequence[int]) -> bool | None:
        nonlocal mix
        lower = "".join("8" if i in group else letter for i, letter in enumerate(mix))
        if not (problem.price(lower) <= problem.price(mix) + SAME_MS and problem.within(lower)):
            return None
        if lower in known or not accurate(ask(lower, f"{DEMOTED} {len(group)}")):
            known.add(lower)
            return False
        mix = lower
        return True

    leave_out(sorted((i for i in gains if mix[i] == "6"), key=gains.__getitem__), lowered, patience)
    return mix


def leave_out(chosen: Sequence[T], without: Callable[[Sequence[T]], bool | None], patience: int) -> None:
    """Leave out of `chosen`, in this order, what the goal does not need: all at once, then half of a needed group.

    `without(group)` leaves the group out for good if the goal is met without it, and returns whether it is; None if
    that is not worth a trial. Ends after `patience` single ones in a row that prove needed.
    """
    left, size, needed = list(chosen), len(chosen), 0
    while left and needed < patience:
        group = left[:size]
        gone = without(group)
        if gone:
            left, needed = left[len(group) :], 0
            size = max(min(size, len(left)), 1)
        elif len(group) > 1:
            size = len(group) // 2
        else:
            left, needed, size = left[1:], needed + (gone is False), 1


def halving(
    measure: Measure,
    candidates: Sequence[Values],
    rungs: Sequence[int],
    enough: Callable[[FinishedTrial], bool] = lambda trial: False,
) -> list[FinishedTrial]:
    """Train all `candidates` for `rungs[0]` steps, the half with the smallest drops for `rungs[1]` steps, and so on.

    Returns the trials of the last rung, the best first; the first trial that is `enough` alone. `rungs` ascend, so that
    each training continues from its checkpoint. A candidate whose training fails (diverges) is left out.
    """
    alive, ranked = list(candidates), []
    for place, steps in enumerate(rungs):
        trials = []
        for point in alive:
            trial = measure({**point, "qat.steps": steps}, _trained(point, steps))
            if trial is not None and enough(trial):
                return [trial]
            trials.append((trial, point))
        known = [(t, p) for t, p in trials if t is not None]
        ranked = sorted(known, key=lambda pair: pair[0].outcome.metrics["accuracy/drop"])
        keep = max(len(ranked) // 2, 1) if place + 1 < len(rungs) else len(ranked)
        alive = [point for _, point in ranked[:keep]]
    return [trial for trial, _ in ranked]


def _trained(point: Values, steps: int) -> str:
    names = {"learning_rate": "rate", "moving": "moving", "learned_scales": "learned", "weight_decay": "decay"}
    words = [f"{name} {_short(point[f'qat.{k}'])}" for k, name in names.items() if f"qat.{k}" in point]
    return f"QAT {steps} steps {', '.join(words)}".rstrip()
