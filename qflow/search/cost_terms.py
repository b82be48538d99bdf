"""The cost of a mix as a sum over groups of operators; a term counts if any operator of its group is int16:

    cost(mix) = base + sum over groups S of amount_S * [some operator of S is int16]

An operator that reads several tensors computes in 16 bits as soon as one of them has 16 bits, and casts those with 8.
So the operators that it reads form a group with a term, and each of them alone has a (negative) term. The costs of
single promotions in an all-int8 mix miss this: on the networks of benchmarks/data they add up to 3.2 times the
difference between all int16 and all int8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

NOTHING = 1e-7  # relative to the cost of all int16: a smaller term is a rounding error
Group = tuple[int, ...]  # indices of letters in a mix, ascending


@dataclass(frozen=True)
class CostTerms:
    """One cost of a mix, as an exact function and as terms for a solver. The unit is that of `exact`."""

    exact: Callable[[str], float]
    """Returns the cost of a mix; one call takes milliseconds on a large network."""
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
        """Return the cost of each of `mixes` by the terms."""
        member, amounts = self._table
        if not mixes or not len(amounts):
            return np.full(len(mixes), self.base)
        letters = np.frombuffer("".join(mixes).encode(), np.uint8).reshape(len(mixes), -1)
        int16 = (letters == ord("6")).astype(np.float32)[:, : len(member)]
        found: np.ndarray = self.base + (int16 @ member > 0.0) @ amounts
        return found

    def __call__(self, mix: str) -> float:
        """Return the cost of `mix` by the terms."""
        return float(self.estimates([mix])[0])


def cost_terms(
    exact: Callable[[str], float], mix: str, groups: Iterable[Group], alone: Iterable[int] = ()
) -> CostTerms:
    """Return the terms of `exact` for the operators at int16 in `mix`, each alone and in `groups`.

    One group of `mix` at a time is set to int8. The change of the cost, less the terms of the groups within this group,
    is the term of the group. The result is exact if the cost has no other terms than these. For the places of `alone`,
    which cannot be int16 in `mix`, the term is what each of them adds to all int8.
    """
    places = {i for i, letter in enumerate(mix) if letter == "6"}
    wanted = {(i,) for i in places} | {tuple(sorted(places & set(group))) for group in groups}
    highest, found = exact(mix), dict[Group, float]()
    for group in sorted(wanted - {()}, key=lambda g: (len(g), g)):
        lower = "".join("8" if i in group else letter for i, letter in enumerate(mix))
        within = sum(found[part] for part in found if set(part) < set(group)) if len(group) > 1 else 0.0
        found[group] = highest - exact(lower) - within
    terms = {group: amount for group, amount in found.items() if abs(amount) > NOTHING * abs(highest)}
    base, lowest = highest - sum(terms.values()), "8" * len(mix)
    added = {(i,): exact(lowest[:i] + "6" + lowest[i + 1 :]) - exact(lowest) for i in alone}
    return CostTerms(exact, base, terms | {g: amount for g, amount in added.items() if abs(amount) > NOTHING * highest})
