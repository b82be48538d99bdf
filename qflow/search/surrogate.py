"""A surrogate of drop and latency: the measured Pareto front, and what a mix that is not measured may add to it.

The drop of a mix is interpolated from its predicted error, with which it rises; its latency is the cost model's. A mix
that exceeds a limit informs the interpolation, but is not part of the front.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from qflow.search.assign import Problem


class Surrogate:
    """The front of the measured mixes, and expected drops of the others."""

    def __init__(self, problem: Problem, drops: Mapping[str, float]) -> None:
        self.problem, self.drops = problem, drops
        known = sorted((problem.error(mix), drop) for mix, drop in drops.items())
        self.errors = [error for error, _ in known]
        self.levels = list(itertools.accumulate((drop for _, drop in known), max))
        self.worst = self.levels[-1], max(map(problem.price, (problem.all_int8, problem.all_int16)))
        self.front: list[str] = []
        for mix in sorted(filter(problem.within, drops), key=lambda m: (problem.price(m), drops[m], m)):
            if not self.front or drops[mix] < drops[self.front[-1]]:
                self.front.append(mix)
        self.points = [(drops[mix], problem.price(mix)) for mix in self.front]
        self.area = hypervolume(self.points, self.worst)

    def expected(self, mixes: Sequence[str]) -> dict[str, float]:
        """Return the expected drops of `mixes` and of all mixes that differ in one operator from one on the front.

        The former follow from the predicted error alone. The latter start from the measured drop and never exceed it,
        not even for a demotion. This is optimistic on purpose: on the front, which holds the cheapest of many mixes,
        the errors of operators rarely add up.
        """
        found = dict(zip(mixes, self._levels(mixes), strict=True))
        for mix in self.front:
            others = [self.problem.flipped(mix, o.place) for o in self.problem.operators]
            level, *levels = self._levels([mix, *others])
            for other, at in zip(others, levels, strict=True):
                found[other] = min(self.drops[mix] + min(at - level, 0.0), found.get(other, np.inf))
        return found

    def _levels(self, mixes: Sequence[str]) -> list[float]:
        return [float(level) for level in np.interp(self.problem.errors(mixes), self.errors, self.levels)]

    def gain(self, drop: float, price: float) -> tuple[float, float]:
        """Return (hypervolume that a mix with this drop and price adds to the front, minus its distance to the front).

        The second number orders mixes that add nothing: the nearest to the front comes first.
        """
        added = hypervolume([*self.points, (drop, price)], self.worst) - self.area
        drops, prices = (worst or 1.0 for worst in self.worst)
        behind = min((max(drop - d, 0.0) / drops + max(price - p, 0.0) / prices for d, p in self.points), default=0.0)
        return added, -behind


def hypervolume(points: Sequence[tuple[float, float]], worst: tuple[float, float]) -> float:
    """Return the area that points of two costs dominate, up to `worst`."""
    area, top = 0.0, worst[1]
    for cost, price in sorted(points):
        if cost < worst[0] and price < top:
            area += (worst[0] - cost) * (top - price)
            top = price
    return area
