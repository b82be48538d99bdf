"""A cost of a mix as a sum over groups of operators, each term counted where any operator of the group is int16:

    cost(mix) = base + sum over groups S of amount_S * [some operator of S is int16]

A reader of several tensors computes in 16 bits as soon as one of them has 16, and casts those that have 8: that is
the group of what it reads, and a (negative) term for each of them alone. Prices of single promotions in all int8
miss this: on the networks of benchmarks/data they add up to 3.2 times what all int16 costs more than all int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

NOTHING = 1e-7  # of the cost of all int16, relative: a smaller term is rounding
Group = tuple[int, ...]  # places of letters in a mix, rising


@dataclass(frozen=True)
class CostTerms:
    """One cost of a mix, exactly, and as terms that a solver can take. Its unit is that of `exact`."""

    exact: Callable[[str], float]
    """What the mix costs; takes milliseconds on a large network."""
    base: float
    terms: Mapping[Group, float]

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        places = 1 + max((place for group in self.terms for place in group), default=-1)
        member = np.zeros((places, len(self.terms)), dtype=np.float32)
        for k, group in enumerate(self.terms):
            member[list(group), k] = 1.0
        return member, np.fromiter(self.terms.values(), float)

    def estimates(self, mixes: Sequence[str]) -> np.ndarray:
        """What each of `mixes` costs by the terms."""
        member, amounts = self._table
        if not mixes or not len(amounts):
            return np.full(len(mixes), self.base)
        letters = np.frombuffer("".join(mixes).encode(), np.uint8).reshape(len(mixes), -1)
        wide = (letters == ord("6")).astype(np.float32)[:, : len(member)]
        found: np.ndarray = self.base + (wide @ member > 0.0) @ amounts
        return found

    def __call__(self, mix: str) -> float:
        """What `mix` costs by the terms."""
        return float(self.estimates([mix])[0])


def cost_terms(exact: Callable[[str], float], mix: str, groups: Iterable[Group]) -> CostTerms:
    """The terms of `exact` for the operators at int16 in `mix`, each alone and in `groups`.

    From `mix` one group at a time goes to int8; what that changes beyond the groups within it is the group's own.
    Exact where the cost has no other terms than these.
    """
    places = {i for i, letter in enumerate(mix) if letter == "6"}
    wanted = {(i,) for i in places} | {tuple(sorted(places & set(group))) for group in groups}
    wide, found = exact(mix), dict[Group, float]()
    for group in sorted(wanted - {()}, key=lambda g: (len(g), g)):
        lower = "".join("8" if i in group else letter for i, letter in enumerate(mix))
        within = sum(found[part] for part in found if set(part) < set(group)) if len(group) > 1 else 0.0
        found[group] = wide - exact(lower) - within
    terms = {group: amount for group, amount in found.items() if abs(amount) > NOTHING * abs(wide)}
    return CostTerms(exact, wide - sum(terms.values()), terms)
