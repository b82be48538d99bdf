"""Which mix to measure next, by a surrogate of the drop and the cost model's time.

Two things make a mix worth a trial: the time that it is expected to save against the best mix while it meets the goal
(Gardner et al. 2014, Bayesian optimization with inequality constraints), and the hypervolume that it is expected to add
to the front of drop and time (Emmerich et al. 2006). The sum of both finds the best mix and the front together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qflow.search.assign import Problem
from qflow.search.surrogate import Measurement, Surrogate, below, expected_fall

BUDGETS = 64  # error budgets, for each of which the cheapest mix by the predicted errors is a candidate
CORRECTED = 7  # levels of the drop, for each of which the cheapest mix by the corrected errors is a candidate
CLIMBED = 4  # mixes of most worth, whose neighbours are candidates too, until none of these is worth more
WORTH = 0.01  # share of what a mix costs beyond all int8, below which an expected saving is not worth a trial
SAVED = 0.5  # what a saving counts beside hypervolume, over the drop of all int8


@dataclass(frozen=True)
class Front:
    """The least drop that was measured up to some time, and the drop and the time up to which area counts."""

    points: Sequence[tuple[float, float]]
    worst: tuple[float, float]

    @cached_property
    def steps(self) -> list[tuple[float, float, float]]:
        """The front as (drop, from that time, to that time)."""
        found, level, start = [], self.worst[0], -np.inf
        for drop, time in sorted(self.points, key=lambda point: (point[1], point[0])):
            if drop < level and time < self.worst[1]:
                found.append((level, start, time))
                level, start = drop, time
        return [*found, (level, start, self.worst[1])]

    def gains(self, drops: np.ndarray, deviations: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Return the hypervolume that mixes with these times and normally distributed drops are expected to add."""
        found = np.zeros(len(times))
        for level, start, end in self.steps:
            width = np.maximum(end - np.maximum(times, start), 0.0)
            found += width * expected_fall(level, drops, deviations)
        return found


class NextMix:
    """Chooses mixes of a problem. `low` and `high` are the drops of its most accurate mix and of all int8."""

    def __init__(self, problem: Problem, max_drop: float, low: float, high: float) -> None:
        self.problem, self.max_drop, self.low, self.high = problem, max_drop, low, high

    def choose_all(
        self, measured: Sequence[Measurement], seen: Collection[str], count: int, *, front: bool = True
    ) -> list[str]:
        """Return up to `count` mixes to measure at once, the first of which is that of `choose`.

        Each further one is chosen as if those before it had their expected drops (Ginsbourger et al. 2010, the kriging
        believer), so that it does not look for the same again.
        """
        chosen: list[str] = []
        while len(chosen) < count and (mix := self.choose(measured, {*seen, *chosen}, front=front)):
            if len(chosen) + 1 < count:
                drops, _ = Surrogate(self.problem, measured, self.low, self.high).expected([mix], "")
                measured = [*measured, Measurement(mix, float(drops[0]))]
            chosen.append(mix)
        return chosen

    def choose(
        self, measured: Sequence[Measurement], seen: Collection[str], settings: str = "", *, front: bool = True
    ) -> str | None:
        """Return the mix that is most worth a trial under `settings`, or None if none is.

        `seen` are the mixes that need no trial there. Without `front` none is worth a trial once no mix is expected to
        save `WORTH` of the time.
        """
        problem, surrogate = self.problem, Surrogate(self.problem, measured, self.low, self.high)
        within = [m for m in measured if problem.within(m.mix)]
        meeting = [problem.price(m.mix) for m in within if round(m.drop - self.max_drop, 9) <= 0.0]
        best, lowest = min(meeting, default=-np.inf), problem.price(problem.all_int8)
        ends = max(m.drop for m in measured), max(lowest, problem.price(problem.all_int16))
        known = Front([(m.drop, problem.price(m.mix)) for m in within], ends)

        def saved(mixes: Sequence[str]) -> np.ndarray:
            times, drops = problem.time.estimates(mixes), surrogate.expected(mixes, settings)
            return np.asarray(np.maximum(best - times, 0.0) * below(self.max_drop, *drops))

        def worth(mixes: Sequence[str]) -> np.ndarray:
            added = known.gains(*surrogate.expected(mixes, settings), problem.time.estimates(mixes))
            return np.asarray(SAVED * surrogate.span * saved(mixes) + added)

        candidates = self._candidates(surrogate.corrected(settings), within, 1 if front else CORRECTED)
        gains = self._climbed(worth, candidates, seen, CLIMBED if front else 0)
        if not front and saved([*gains]).max(initial=0.0) <= WORTH * max(best - lowest, 0.0):
            return None
        order = sorted((mix for mix in gains if gains[mix] > 0.0), key=gains.__getitem__, reverse=True)
        return next((mix for mix in order if problem.within(mix)), None)

    def _candidates(self, corrected: Problem, within: Sequence[Measurement], count: int) -> list[str]:
        """Return the cheapest mixes by predicted errors, and for `count` drops by corrected ones, and the front's."""
        shares = np.linspace(0.0, 1.0, CORRECTED - 1, endpoint=False) ** 2
        levels = [self.max_drop - self.low, *((self.high - self.low) * shares).tolist()]
        front: dict[str, float] = {}
        for m in sorted(within, key=lambda m: (self.problem.price(m.mix), m.drop, m.mix)):
            if m.drop < min(front.values(), default=np.inf):
                front[m.mix] = m.drop
        return [*self._solved, *(corrected.cheapest(level) for level in levels[:count]), *self._neighbours(front)]

    def _climbed(
        self, worth: Callable[[Sequence[str]], np.ndarray], mixes: Sequence[str], seen: Collection[str], most: int
    ) -> dict[str, float]:
        """Return what `mixes` are worth, and the neighbours of the `most` best ones, until none of these is better."""
        found, spread = dict[str, float](), set[str]()
        while new := [mix for mix in dict.fromkeys(mixes) if mix not in found and mix not in seen]:
            found |= dict(zip(new, worth(new).tolist(), strict=True))
            best = sorted(found, key=found.__getitem__, reverse=True)[:most]
            mixes = self._neighbours(mix for mix in best if mix not in spread)
            spread |= {*best}
        return found

    def _neighbours(self, mixes: Iterable[str]) -> list[str]:
        """Return the mixes that differ in one letter from one of `mixes`."""
        return [self.problem.flipped(mix, o.place) for mix in mixes for o in self.problem.operators]

    @cached_property
    def _solved(self) -> list[str]:
        return [self.problem.cheapest(self.problem.budget((k / BUDGETS) ** 2)) for k in range(1, BUDGETS)]
