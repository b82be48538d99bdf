"""Products of two tensors that are summed over some axes (matmul, bmm, einsum), by one letter for each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_BATCH = "ABCDEFGH"


@dataclass(frozen=True)
class Letters:
    """The axes of the two operands and of the result; what has the same letter is multiplied with each other."""

    left: str
    right: str
    out: str

    @property
    def summed(self) -> str:
        """The axes that both operands have and the result has not."""
        return "".join(x for x in self.left if x in self.right and x not in self.out)


def letters_of(name: str, arguments: Sequence[Any], ndims: Sequence[int]) -> Letters | None:
    """The axes of an operator; None if it is no plain product of two tensors that have two axes or more."""
    if len(ndims) != 2 or min(ndims) < 2:
        return None
    if name == "einsum":
        sides, _, out = str(arguments[0]).replace(" ", "").partition("->")
        left, _, right = sides.partition(",")
        plain = all(term.isalpha() and len(set(term)) == len(term) for term in (left, right, out))
        return Letters(left, right, out) if plain and (len(left), len(right)) == tuple(ndims) else None
    if name not in ("matmul", "bmm", "mm"):
        return None
    batch = _BATCH[: max(ndims) - 2]
    left, right = (batch[len(batch) - (ndim - 2) :] for ndim in ndims)
    return Letters(f"{left}ik", f"{right}kj", f"{batch}ij")


def placed(ids: Tensor, own: str, out: str) -> Tensor:
    """`ids` with the axes `own` as axes `out`: of size 1 where it has no such axis, the first where `out` has not."""
    for axis in reversed([i for i, x in enumerate(own) if x not in out]):
        ids = ids.select(axis, 0)
    left = [x for x in own if x in out]
    ids = ids.permute([left.index(x) for x in out if x in left])
    for i, x in enumerate(out):
        if x not in left:
            ids = ids.unsqueeze(i)
    return ids
