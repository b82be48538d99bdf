"""Which operators get int16: a 0/1 program over what each one's int8 error is and what mixes cost.

    cheapest       min time    subject to  sum of errors <= budget, and the limits
    most accurate  min errors  subject to  time <= budget, and the limits

Errors of single operators are added up, as if they were independent; what that is worth shows in the measurements
(strategies.py). Costs are sums over groups of operators (cost_terms.py), a variable each, so that what operators share
is counted once. HiGHS (scipy.optimize.milp) solves it within `GAP` of what int16 adds, or to the best that `NODES`
nodes find. A cost that is not such a sum is approximated; a limit is held to the exact figure all the same.
A mix is text, a letter an operator: 8 int8, 6 int16.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from qflow.search.cost_terms import CostTerms
from qflow.search.integer_program import Row, solve

SLACK = 1e-9  # relative: what meets a bound on paper meets it in floating point
TOLERANCE = 1e-6  # relative: the solver's own, within which it takes a bound as kept
TIGHTENED = 8  # most times that a limit is drawn in because the exact figure exceeds it


@dataclass(frozen=True)
class Operator:
    """One operator that can be int16: its error at both precisions, and the place of its letter."""

    name: str
    int8_error: float
    int16_error: float
    place: int

    @property
    def gain(self) -> float:
        """Error that int16 takes away."""
        return self.int8_error - self.int16_error

    def known(self, worst: float) -> Operator:
        """Itself, with `worst` for an int8 error and 0 for an int16 error that is no finite number."""
        int8 = self.int8_error if math.isfinite(self.int8_error) else worst
        int16 = self.int16_error if math.isfinite(self.int16_error) else 0.0
        return replace(self, int8_error=int8, int16_error=int16)


@dataclass(frozen=True)
class Limit:
    """A figure of a mix that may be at most `most`."""

    cost: CostTerms
    most: float

    def holds(self, mix: str) -> bool:
        """Whether the exact figure of `mix` is within the limit."""
        return round(self.cost.exact(mix) - self.most, 9) <= 0.0


@dataclass(frozen=True)
class Problem:
    """Operators whose precision is free, in graph order, the time in ms of a whole mix, and what bounds a mix.

    A mix has `letters` letters; those of operators that are not free stay 8 and mean nothing. An error that is no
    number counts as the largest that is one: unknown is not harmless.
    """

    operators: tuple[Operator, ...]
    time: CostTerms
    letters: int
    limits: tuple[Limit, ...] = ()

    def __post_init__(self) -> None:
        known = [e for o in self.operators for e in (o.int8_error, o.int16_error) if math.isfinite(e)]
        worst = max(known, default=1.0)
        object.__setattr__(self, "operators", tuple(o.known(worst) for o in self.operators))

    def bounded(self, *limits: Limit) -> Problem:
        """The same problem within `limits` too."""
        return replace(self, limits=(*self.limits, *limits))

    def price(self, mix: str) -> float:
        """Predicted time in ms, exactly as the cost model has it."""
        return self.time.exact(mix)

    def error(self, mix: str) -> float:
        """Predicted error: the sum over operators."""
        return sum(o.int16_error if mix[o.place] == "6" else o.int8_error for o in self.operators)

    def errors(self, mixes: Sequence[str]) -> np.ndarray:
        """Predicted errors of many mixes."""
        return self._loss.estimates(mixes)

    def within(self, mix: str) -> bool:
        """Whether `mix` keeps every limit."""
        return all(limit.holds(mix) for limit in self.limits)

    @property
    def all_int8(self) -> str:
        """Nothing promoted."""
        return "8" * self.letters

    @cached_property
    def all_int16(self) -> str:
        """Everything promoted."""
        return self._with(o.place for o in self.operators)

    def budget(self, share: float) -> float:
        """Error budget that keeps `share` (0..1) of what int16 can take away."""
        low, high = self.error(self.all_int16), self.error(self.all_int8)
        return low + share * max(high - low, 0.0)

    def cheapest(self, max_error: float) -> str:
        """The mix of least time whose predicted error is at most `max_error`; the most accurate one where none is."""
        if self.error(self.all_int8) <= max_error and self.within(self.all_int8):
            return self.all_int8
        loss = self._loss
        least = loss.base - sum(max(o.gain, 0.0) for o in self.operators)
        reach = SLACK * (loss.base - least)  # a budget that all int16 just meets stays one that it meets
        found = self._solved(self.time, [Row(loss.terms, max(max_error, least + reach) - loss.base)])
        if found is None or max_error < least - reach:
            return self.most_accurate()
        return self._pruned(found, max_error)

    def most_accurate(self, max_ms: float = math.inf) -> str:
        """The mix of least predicted error that int16 makes at most `max_ms` slower than all int8; all int8 where the
        limits leave nothing.
        """
        if max_ms < math.inf:
            return self.bounded(Limit(self.time, self.price(self.all_int8) + max(max_ms, 0.0))).most_accurate()
        found = self._solved(self._loss, []) or self._raised()
        return self._pruned(found, self.error(found))

    @cached_property
    def _loss(self) -> CostTerms:
        """The predicted error as terms."""
        return CostTerms(self.error, self.error(self.all_int8), {(o.place,): -o.gain for o in self.operators})

    def _solved(self, least: CostTerms, rows: Sequence[Row]) -> str | None:
        """The mix of least `least` within `rows` and the limits; None where there is none.

        Where a limit's terms promise less than the exact figure, the limit is drawn in by the difference.
        """
        places = [o.place for o in self.operators]
        rooms = [limit.most - limit.cost.base for limit in self.limits]
        for _ in range(TIGHTENED):
            bounds = [Row(limit.cost.terms, room) for limit, room in zip(self.limits, rooms, strict=True)]
            chosen = solve(least.terms, [*rows, *bounds], places)
            if chosen is None:
                return None
            mix = self._with(chosen)
            if self.within(mix):
                return mix
            over = [max(limit.cost.exact(mix) - limit.most, 0.0) for limit in self.limits]
            rooms = [r - (by + TOLERANCE * abs(r) if by else 0.0) for r, by in zip(rooms, over, strict=True)]
        return None

    def _with(self, places: Iterable[int]) -> str:
        chosen = set(places)
        return "".join("6" if i in chosen else "8" for i in range(self.letters))

    def _raised(self) -> str:
        """All int8 with operators raised, most gain first, while the limits hold: where a limit is no sum of terms."""
        mix = self.all_int8
        for o in sorted(self.operators, key=lambda o: -o.gain):
            higher = mix[: o.place] + "6" + mix[o.place + 1 :]
            if o.gain > 0.0 and self.within(higher):
                mix = higher
        return mix

    def _pruned(self, mix: str, max_error: float) -> str:
        """Without operators that budget, limits and time can do without (free ones that the solver left in)."""
        for o in sorted((o for o in self.operators if mix[o.place] == "6"), key=lambda o: o.gain):
            lower = mix[: o.place] + "8" + mix[o.place + 1 :]
            fits = self.error(lower) <= max_error and self.time(lower) <= self.time(mix) + SLACK
            if fits and self.within(lower):
                mix = lower
        return mix
