"""Which mix to measure next, by a surrogate of the drop and the cost model's time.

Two things make a mix worth a trial: the time that it is expected to save against the best mix while it meets the goal
(Gardner et al. 2014, Bayesian optimization with inequality constraints), and the hypervolume that it is expected to add
to the front of drop and time (Emmerich et al. 2006). The sum of both finds the best mix and the front together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qflow.search.assign import Problem
from qflow.search.surrogate import Measurement, Surrogate, below, expected_fall

BUDGETS = 64  # error budgets, for each of which the cheapest mix by the predicted errors is a candidate
CORRECTED = 6  # levels of the drop, for each of which the cheapest mix by the corrected errors is a candidate
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

    def choose(
        self, measured: Sequence[Measurement], seen: Collection[str], settings: str = "", *, front: bool = True
    ) -> str | None:
        """Return the mix that is most worth a trial under `settings`, or None if none is.

        `seen` are the mixes that need no trial there. Without `front` none is worth a trial once no mix is expected to
        save `WORTH` of the time.
        """
        problem, surrogate = self.problem, Surrogate(self.problem, measured, self.low, self.high)
        within = [m for m in measured if problem.within(m.mix)]
        mixes = [mix for mix in self._candidates(surrogate, within, settings) if mix not in seen]
        times, drops = problem.time.estimates(mixes), surrogate.expected(mixes, settings)
        meeting = [problem.price(m.mix) for m in within if round(m.drop - self.max_drop, 9) <= 0.0]
        best, lowest = min(meeting, default=-np.inf), problem.price(problem.all_int8)
        saved = np.maximum(best - times, 0.0) * below(self.max_drop, *drops)
        if not front and saved.max(initial=0.0) <= WORTH * max(best - lowest, 0.0):
            return None
        ends = max(m.drop for m in measured), max(lowest, problem.price(problem.all_int16))
        added = Front([(m.drop, problem.price(m.mix)) for m in within], ends).gains(*drops, times)
        gains = SAVED * surrogate.span * saved + added
        order = np.argsort(-gains, kind="stable")
        return next((mixes[k] for k in order if gains[k] > 0.0 and problem.within(mixes[k])), None)

    def _candidates(self, surrogate: Surrogate, within: Sequence[Measurement], settings: str) -> dict[str, None]:
        """Return the cheapest mixes for some error budgets, and all that differ in one letter from the front."""
        problem, corrected = self.problem, surrogate.corrected(settings)
        levels = [self.max_drop - self.low, *(surrogate.span * (k / CORRECTED) ** 2 for k in range(CORRECTED))]
        front: dict[str, float] = {}
        for m in sorted(within, key=lambda m: (problem.price(m.mix), m.drop, m.mix)):
            if m.drop < min(front.values(), default=np.inf):
                front[m.mix] = m.drop
        flipped = (problem.flipped(mix, o.place) for mix in front for o in problem.operators)
        return dict.fromkeys([*self._solved, *(corrected.cheapest(level) for level in levels), *flipped])

    @cached_property
    def _solved(self) -> list[str]:
        return [self.problem.cheapest(self.problem.budget((k / BUDGETS) ** 2)) for k in range(1, BUDGETS)]
