"""Factors of channels as unknowns: which of them are equal, which are inverse to each other, and which have to be 1.

Every element of a tensor has the id of a variable: v for a value that is multiplied by factor s_v, -v for one that is
divided by it. `ANY` (0) is the id of a value that is zero, which takes any factor, and `FIXED` that of a value which
stays as it is. Ids are float64 tensors (exact up to 2^53), because torch moves, pads and joins those like the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ANY, FIXED = 0, 1


class Variables:
    """All variables of a model; equal ones have the same root, which is the smallest of them."""

    def __init__(self) -> None:
        self.root = torch.arange(2)
        self.sign = torch.ones(2, dtype=torch.long)
        """-1 where the factor is the inverse of that of the root."""
        self._why = torch.arange(2)
        self._reasons = ["", "it stays as it is"]

    def __len__(self) -> int:
        return len(self.root)

    def new(self, count: int) -> Tensor:
        """Return the ids of new variables [count]."""
        first = len(self)
        self.root = torch.cat([self.root, torch.arange(first, first + count)])
        self.sign = torch.cat([self.sign, torch.ones(count, dtype=torch.long)])
        self._why = torch.cat([self._why, torch.zeros(count, dtype=torch.long)])
        return torch.arange(first, first + count).double()

    def of(self, ids: Tensor) -> Tensor:
        """Each id with the root of its variable in its place, int64."""
        known = ids.long()
        return self.root[known.abs()] * self.sign[known.abs()] * known.sign()

    def free_roots(self, ids: Tensor) -> Tensor:
        """The roots of those of these factors that may differ from 1, int64, sorted."""
        there = torch.zeros(len(self), dtype=torch.bool)
        there[self.of(thin(ids)).abs()] = True
        there[ANY] = False
        return (there & (self._why == 0)).nonzero().flatten()

    def free(self, ids: Tensor) -> bool:
        """True if one of these factors may differ from 1."""
        return len(self.free_roots(ids)) > 0

    def reason(self, id: float) -> str:
        """Why this factor has to be 1; empty if it need not."""
        return self._reasons[int(self._why[self.root[abs(int(id))]])]

    def fix(self, ids: Tensor, why: str) -> None:
        """Let these factors be 1, because of `why`; the first reason stays."""
        roots = self.free_roots(ids)
        if len(roots):
            self._why[roots] = self._code(why)

    def equal(self, a: Tensor, b: Tensor, why: str) -> None:
        """Let the factors of `a` be those of `b`, element by element; `why` counts where one of them is FIXED."""
        shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
        a, b = a.expand(shape), b.expand(shape)
        axes = [i for i in range(a.ndim) if a.stride(i) == 0 and b.stride(i) == 0]
        a, b = (thin(ids, axes).flatten().long() for ids in (a, b))
        both, base = (a != ANY) & (b != ANY), 2 * len(self)
        codes = torch.unique(
            (a[both] + len(self)) * base + b[both] + len(self)
        )  # one number for each pair: it sorts fast
        pairs = torch.stack([codes // base, codes % base]) - len(self)
        while pairs.shape[1]:
            low, high = self.of(pairs[0]), self.of(pairs[1])
            low, high = torch.where(low.abs() < high.abs(), low, high), torch.where(low.abs() < high.abs(), high, low)
            self.fix(high[low == -high].double(), "a factor and its inverse are equal")
            known = low.abs() == FIXED
            self.fix(high[known & (high.abs() != FIXED)].double(), why)
            apart = ~known & (low.abs() != high.abs())
            if not bool(apart.any()):
                return
            self._merge(low[apart] * high[apart].sign(), high[apart].abs())

    def _merge(self, low: Tensor, high: Tensor) -> None:
        """Give each root in `high` the root |low|, the first that is named with it."""
        order = high.argsort(stable=True)
        low, high = low[order], high[order]
        first = torch.ones_like(high, dtype=torch.bool)
        first[1:] = high[1:] != high[:-1]
        low, high = low[first], high[first]
        target, sign = torch.arange(len(self)), torch.ones(len(self), dtype=torch.long)
        target[high], sign[high] = low.abs(), low.sign()
        while not torch.equal(target[target], target):
            target, sign = target[target], sign * sign[target]
        moved = high[self._why[high] > 0]
        free = moved[self._why[target[moved]] == 0]
        self._why = self._why.scatter_reduce(0, target[free], self._why[free], "amax")
        self.root, self.sign = target[self.root], self.sign * sign[self.root]

    def unify(self, ids: Tensor, axes: Sequence[int], why: str) -> Tensor:
        """Let the factors along `axes` be equal; return their ids, with a size of 1 along `axes`."""
        axes = sorted(axis % ids.ndim for axis in axes)
        shape = [1 if i in axes else size for i, size in enumerate(ids.shape)]
        if not axes:
            return ids
        ids = thin(ids, axes)
        last = ids.movedim(axes, list(range(ids.ndim - len(axes), ids.ndim))).flatten(ids.ndim - len(axes))
        one = last.gather(-1, last.abs().argmax(-1, keepdim=True))  # a zero takes any factor
        if last.shape[-1] > 1:
            self.equal(one, last, why)
        return one.reshape(shape)

    def _code(self, why: str) -> int:
        if why not in self._reasons:
            self._reasons.append(why)
        return self._reasons.index(why)


def thin(ids: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """`ids` without repetitions: of size 1 along those of `axes` (or all) that an `expand` has made."""
    for axis in range(ids.ndim) if axes is None else axes:
        if ids.stride(axis) == 0 and ids.shape[axis] > 1:
            ids = ids.narrow(axis, 0, 1)
    return ids
