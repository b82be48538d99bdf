"""The choice of int16 operators as a 0/1 program, from the int8 error of each operator and the cost of mixes.

    cheapest       min time    subject to  sum of errors <= budget, and the limits
    most accurate  min errors  subject to  time <= budget, and the limits

The errors of single operators are added up as if they were independent; surrogate.py corrects them by measurements, and
adds what pairs of operators that stay int8 together lose beyond that sum. A pair is a group too: it loses nothing as
soon as one of the two is int16.
Costs are sums over groups of operators (cost_terms.py), with one variable for each group, so that a cost which several
operators share is counted once. HiGHS (scipy.optimize.milp) solves the program within `GAP` of what int16 adds, or
returns the best solution that it finds in `NODES` nodes. A cost that is not such a sum is approximated, but each limit
is checked against the exact cost. A mix is a string with one letter for each operator: 8 for int8, 6 for int16. The
weight of an operator may have a letter of its own; where the device takes no int16 weight with an int16 input, the two
letters exclude each other: at most one of them is 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from qflow.search.cost_terms import CostTerms, Group
from qflow.search.integer_program import Row, solve

SLACK = 1e-9  # relative: keeps a bound that is met exactly from being missed by rounding
TOLERANCE = 1e-6  # relative: the solver takes a bound as kept within this tolerance
TIGHTENED = 8  # how often a limit is tightened at most, while the exact cost exceeds it


@dataclass(frozen=True)
class Operator:
    """One operator that can be int16: its error at both precisions, and the index of its letter in a mix."""

    name: str
    int8_error: float
    int16_error: float
    place: int
    weight: bool = False
    """The letter is for the weight of the operator, not for its output."""

    @property
    def gain(self) -> float:
        """By how much int16 lowers the error."""
        return self.int8_error - self.int16_error

    def known(self, worst: float) -> Operator:
        """Return the operator with errors that are not finite replaced by `worst`; NaN at int16, unknown, by 0."""
        int8 = self.int8_error if math.isfinite(self.int8_error) else worst
        unknown = 0.0 if math.isnan(self.int16_error) else worst
        int16 = self.int16_error if math.isfinite(self.int16_error) else unknown
        return replace(self, int8_error=int8, int16_error=int16)


@dataclass(frozen=True)
class Limit:
    """A cost of a mix with its upper bound `most`."""

    cost: CostTerms
    most: float

    def holds(self, mix: str) -> bool:
        """Return whether the exact cost of `mix` is within the limit."""
        return round(self.cost.exact(mix) - self.most, 9) <= 0.0


@dataclass(frozen=True)
class Problem:
    """The operators whose precision is free, in graph order, the time of a mix in ms, and the limits of a mix.

    A mix has `letters` letters. Those of operators that are not free stay 8 and have no effect. An int8 error that is
    not finite counts as the largest finite error, because an unknown error may be large. `exclusions` are pairs of
    letters that cannot both be 6; the cost of such a mix is never asked for.
    """

    operators: tuple[Operator, ...]
    time: CostTerms
    letters: int
    limits: tuple[Limit, ...] = ()
    exclusions: tuple[tuple[int, int], ...] = ()
    pairs: Mapping[Group, float] = field(default_factory=dict)
    """What two operators lose beyond the sum of their errors while both are int8, by the letters of the two."""

    def __post_init__(self) -> None:
        known = [e for o in self.operators for e in (o.int8_error, o.int16_error) if math.isfinite(e)]
        worst = max(known, default=1.0)
        object.__setattr__(self, "operators", tuple(o.known(worst) for o in self.operators))

    def bounded(self, *limits: Limit) -> Problem:
        """Return the same problem with `limits` added to its limits."""
        return replace(self, limits=(*self.limits, *limits))

    def price(self, mix: str) -> float:
        """Return the time in ms that the cost model predicts for `mix`."""
        return self.time.exact(mix)

    def error(self, mix: str) -> float:
        """Return the predicted error of `mix`: the sum over the operators and the pairs."""
        single = sum(o.int16_error if mix[o.place] == "6" else o.int8_error for o in self.operators)
        return single + sum(amount for (a, b), amount in self.pairs.items() if mix[a] == mix[b] == "8")

    def errors(self, mixes: Sequence[str]) -> np.ndarray:
        """Return the predicted error of each of `mixes`."""
        return self._loss.estimates(mixes)

    def within(self, mix: str) -> bool:
        """Return whether the device takes `mix`, and it keeps every limit."""
        legal = not any(mix[a] == mix[b] == "6" for a, b in self.exclusions)
        return legal and all(limit.holds(mix) for limit in self.limits)

    def flipped(self, mix: str, place: int) -> str:
        """Return `mix` with one letter changed. A promotion demotes what it excludes."""
        if mix[place] == "6":
            return mix[:place] + "8" + mix[place + 1 :]
        excluded = {b if a == place else a for a, b in self.exclusions if place in (a, b)}
        return "".join("6" if i == place else "8" if i in excluded else letter for i, letter in enumerate(mix))

    def plain(self, mix: str) -> str:
        """Return `mix` with the letters of operators that are not free at 8, where they have no effect."""
        free = {o.place for o in self.operators}
        return "".join(letter if i in free else "8" for i, letter in enumerate(mix))

    @property
    def all_int8(self) -> str:
        """The mix with all operators at int8."""
        return "8" * self.letters

    @cached_property
    def all_int16(self) -> str:
        """The mix with the outputs of all free operators at int16, and all weights at int8."""
        return self._with(o.place for o in self.operators if not o.weight)

    @cached_property
    def finest(self) -> str:
        """The mix of least predicted error, whatever it costs; without weights and pairs it is all int16."""
        if not (self.exclusions or self.pairs):
            return self._with(o.place for o in self.operators if o.gain >= 0.0)
        return replace(self, limits=()).most_accurate()

    def budget(self, share: float) -> float:
        """Return the error budget that leaves `share` (0..1) of the error that int16 can remove."""
        low, high = self.error(self.finest), self.error(self.all_int8)
        return low + share * max(high - low, 0.0)

    def cheapest(self, max_error: float) -> str:
        """Return the fastest mix with a predicted error of at most `max_error`; if there is none, the most accurate."""
        if self.error(self.all_int8) <= max_error and self.within(self.all_int8):
            return self.all_int8
        loss = self._loss
        coupled = self.exclusions or self.pairs
        least = self.error(self.finest) if coupled else loss.base - sum(max(o.gain, 0.0) for o in self.operators)
        reach = SLACK * (loss.base - least)  # rounding must not put a budget that all int16 just meets out of reach
        found = self._solved(self.time, [Row(loss.terms, max(max_error, least + reach) - loss.base)])
        if found is None or max_error < least - reach:
            return self.most_accurate()
        return self._pruned(found, max_error)

    def most_accurate(self, max_ms: float = math.inf) -> str:
        """Return the mix of least predicted error that takes at most `max_ms` longer than all int8.

        If the limits allow no promotion, that is all int8.
        """
        if max_ms < math.inf:
            return self.bounded(Limit(self.time, self.price(self.all_int8) + max(max_ms, 0.0))).most_accurate()
        found = self._solved(self._loss, []) or self._raised()
        return self._pruned(found, self.error(found))

    @cached_property
    def _loss(self) -> CostTerms:
        """The predicted error of a mix as terms."""
        terms: dict[Group, float] = {(o.place,): -o.gain for o in self.operators}
        terms |= {tuple(sorted(pair)): -amount for pair, amount in self.pairs.items()}
        return CostTerms(self.error, self.error(self.all_int8), terms)

    def _solved(self, least: CostTerms, rows: Sequence[Row]) -> str | None:
        """Return the mix with the smallest `least` within `rows` and the limits, or None if there is none.

        Where the terms of a limit predict less than the exact cost, the limit is tightened by the difference.
        """
        places = [o.place for o in self.operators]
        one_of = [Row({(a,): 1.0, (b,): 1.0}, 1.0) for a, b in self.exclusions]
        bounds = [limit.most - limit.cost.base for limit in self.limits]
        for _ in range(TIGHTENED):
            limited = [Row(limit.cost.terms, bound) for limit, bound in zip(self.limits, bounds, strict=True)]
            found = solve(least.terms, [*rows, *limited, *one_of], places)
            if found is None:
                return None
            mix = self._with(found.places)
            if self.within(mix):
                return mix
            over = [max(limit.cost.exact(mix) - limit.most, 0.0) for limit in self.limits]
            bounds = [b - (by + TOLERANCE * abs(b) if by else 0.0) for b, by in zip(bounds, over, strict=True)]
        return None

    def _with(self, places: Iterable[int]) -> str:
        chosen = set(places)
        return "".join("6" if i in chosen else "8" for i in range(self.letters))

    def _raised(self) -> str:
        """Promote operators of all int8, most gain first, while the limits hold.

        The solver finds no mix where a limit is not a sum of terms; this greedy choice replaces it there.
        """
        mix = self.all_int8
        for o in sorted(self.operators, key=lambda o: -o.gain):
            higher = mix[: o.place] + "6" + mix[o.place + 1 :]
            if o.gain > 0.0 and self.within(higher):
                mix = higher
        return mix

    def _pruned(self, mix: str, max_error: float) -> str:
        """Return `mix` with int16 operators demoted that neither error budget, limits nor time need.

        The solver leaves promotions in that cost nothing. Some do so only together with those that one operator reads
        beside them.
        """
        singles = [(o.place,) for o in sorted(self.operators, key=lambda o: o.gain)]
        for group in (*singles, *sorted(group for group in self.time.terms if len(group) > 1)):
            lower = "".join("8" if i in group else letter for i, letter in enumerate(mix))
            fits = self.error(lower) <= max_error and self.time(lower) <= self.time(mix) + SLACK
            if lower != mix and fits and self.within(lower):
                mix = lower
        return mix
