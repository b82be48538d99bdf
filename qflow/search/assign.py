"""Which operators get int16: a 0/1 knapsack over what each one's int8 error is and what its int16 costs.

    cheapest       min sum of ms_i x_i    subject to  sum of e8_i (1 - x_i) + e16_i x_i <= budget
    most accurate  min sum of errors      subject to  sum of ms_i x_i <= budget

Errors of single operators are added up, as if they were independent; what that is worth shows in the measurements
(strategies.py). Solved exactly by HiGHS (scipy.optimize.milp); a search re-solves for every new budget, because
scores and prices do not depend on it. An assignment is text, a letter an operator: 8 int8, 6 int16.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

FEWER_MS = 1e-7  # among equal times the mix with fewer int16 operators
SLACK = 1e-9  # of the budget, relative: errors that meet it on paper meet it in floating point


@dataclass(frozen=True)
class Operator:
    """One operator that can be int16: its error at both precisions, and what int16 costs it in ms."""

    name: str
    int8_error: float
    int16_error: float
    int16_ms: float

    @property
    def gain(self) -> float:
        """Error that int16 takes away."""
        return self.int8_error - self.int16_error


@dataclass(frozen=True)
class Problem:
    """Operators in graph order, and the predicted time in ms of a whole assignment: parts share what they cost."""

    operators: tuple[Operator, ...]
    price: Callable[[str], float]

    def error(self, assignment: str) -> float:
        """Predicted error: the sum over operators."""
        return sum(
            o.int16_error if letter == "6" else o.int8_error
            for o, letter in zip(self.operators, assignment, strict=True)
        )

    @property
    def all_int8(self) -> str:
        """Nothing promoted."""
        return "8" * len(self.operators)

    @property
    def all_int16(self) -> str:
        """Everything promoted."""
        return "6" * len(self.operators)

    def budget(self, share: float) -> float:
        """Error budget that keeps `share` (0..1) of what int16 can take away."""
        low, high = self.error(self.all_int16), self.error(self.all_int8)
        return low + share * max(high - low, 0.0)

    def cheapest(self, max_error: float) -> str:
        """The mix of least time whose predicted error is at most `max_error`; all int16 where none is."""
        useful = [i for i, o in enumerate(self.operators) if o.gain > 0.0]
        gains = np.array([self.operators[i].gain for i in useful])
        needed = self.error(self.all_int8) - max_error
        if needed <= 0.0:
            return self.all_int8
        if gains.sum() * (1.0 + SLACK) <= needed:
            return self._with(useful)
        costs = np.array([max(self.operators[i].int16_ms, 0.0) + FEWER_MS for i in useful])
        chosen = _solve(costs, gains, at_least=min(needed, gains.sum() * (1.0 - SLACK)))
        return self._pruned(self._with(useful[k] for k in chosen), max_error)

    def most_accurate(self, max_ms: float) -> str:
        """The mix of least predicted error that int16 makes at most `max_ms` slower than all int8."""
        useful = [i for i, o in enumerate(self.operators) if o.gain > 0.0]
        gains = np.array([self.operators[i].gain for i in useful])
        costs = np.array([max(self.operators[i].int16_ms, 0.0) for i in useful])
        return self._with(useful[k] for k in _solve(-gains, -costs, at_least=-max(max_ms, 0.0)))

    def _with(self, places: Iterable[int]) -> str:
        chosen = set(places)
        return "".join("6" if i in chosen else "8" for i in range(len(self.operators)))

    def _pruned(self, assignment: str, max_error: float) -> str:
        """Without operators that the budget can do without (free ones that the solver left in), least gain first."""
        places = [i for i, letter in enumerate(assignment) if letter == "6"]
        for i in sorted(places, key=lambda i: self.operators[i].gain):
            lower = assignment[:i] + "8" + assignment[i + 1 :]
            if self.error(lower) <= max_error:
                assignment = lower
        return assignment


def _solve(costs: np.ndarray, gains: np.ndarray, at_least: float) -> list[int]:
    """Places x_i = 1 of: minimise costs.x subject to gains.x >= at_least."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    if not len(costs):
        return []
    scale = float(np.max(np.abs(gains))) or 1.0
    unit = float(np.max(np.abs(costs))) or 1.0
    with _quiet():
        found = milp(
            costs / unit,
            constraints=LinearConstraint(gains[None] / scale, lb=at_least / scale),
            integrality=np.ones(len(costs)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:  # the budget cannot be met
        return []
    return [i for i, x in enumerate(found.x) if x > 0.5]


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS prints some lines whatever it is told; a search's output is for people."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
