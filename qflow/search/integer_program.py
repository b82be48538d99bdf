"""The 0/1 program of an assignment: it chooses the int16 places so that a cost over groups is least, within bounds.

Each place i has a variable x_i that is 0 or 1. Each group S of several places has a variable y_S that is 1 if any of
its x_i is 1: x_i <= y_S for each i in S, and y_S <= sum of x_i over S. If all x are integers, so are all y; therefore
the solver branches on x only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from qflow.search.cost_terms import Group

GAP = 1e-4  # relative gap to the optimum at which the solver stops
NODES = 5000  # of the search tree; a limit in seconds would make the result depend on the machine


@dataclass(frozen=True)
class Row:
    """A constraint: the terms of all groups with an int16 operator add up to at most `most`."""

    terms: Mapping[Group, float]
    most: float


@dataclass(frozen=True)
class Solution:
    """The places that are int16, and the relative gap to the optimum that the solver proves: 0 if it is the optimum."""

    places: list[int]
    gap: float = 0.0


def solve(cost: Mapping[Group, float], rows: Sequence[Row], places: Sequence[int]) -> Solution | None:
    """Return which of `places` are int16 so that `cost` is least within `rows`, or None if nothing satisfies `rows`.

    All groups consist of members of `places`.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    shared = dict.fromkeys(g for terms in (cost, *(row.terms for row in rows)) for g in terms if len(g) > 1)
    column = {group: k for k, group in enumerate([*((i,) for i in places), *shared])}
    if not column:
        return Solution([]) if all(row.most >= 0.0 for row in rows) else None
    objective, _ = _scaled(Row(cost, 0.0), column)
    constraints = [LinearConstraint(values, ub=most) for values, most in (_scaled(row, column) for row in rows)]
    if shared:
        constraints.append(LinearConstraint(_links(list(shared), column), ub=0.0))
    with _quiet():
        found = milp(
            objective,
            constraints=constraints,
            integrality=[1] * len(places) + [0] * len(shared),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    if found.x is None:
        return None
    return Solution([i for i, x in zip(places, found.x, strict=False) if x > 0.5], float(found.mip_gap))


def _scaled(row: Row, column: Mapping[Group, int]) -> tuple[np.ndarray, float]:
    """Return the row by column, scaled to a largest absolute value of 1, since the solver's tolerances are absolute."""
    values = np.zeros(len(column))
    for group, amount in row.terms.items():
        values[column[group]] = amount
    unit = float(np.max(np.abs(values))) or 1.0
    return values / unit, row.most / unit


def _links(groups: Sequence[Group], column: Mapping[Group, int]) -> object:
    """Return the rows (each at most 0) that tie the variable of each group to those of its places."""
    from scipy.sparse import csr_array

    entries: list[tuple[int, int, float]] = []
    height = 0
    for group in groups:
        singles, own = [column[i,] for i in group], column[group]
        for single in singles:
            entries += [(height, single, 1.0), (height, own, -1.0)]
            height += 1
        entries += [(height, own, 1.0), *((height, single, -1.0) for single in singles)]
        height += 1
    rows, columns, values = zip(*entries, strict=True)
    return csr_array((values, (rows, columns)), shape=(height, len(column)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Redirect standard output to /dev/null, because HiGHS prints some lines even when its display is off."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
