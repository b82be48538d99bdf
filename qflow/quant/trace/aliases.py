"""Live tensors by their memory: which other tensors does a write change?"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_EXACT = 2**26
"""Largest storage, in elements, for which overlap is computed; in a larger one all tensors count as overlapping."""


class Aliases:
    """The live tensors of one trace, by storage."""

    def __init__(self) -> None:
        self._live: dict[int, list[weakref.ref[Tensor]]] = {}
        self._limit: dict[int, int] = {}

    def add(self, tensor: Tensor) -> None:
        """From here on, `overlapping` finds `tensor`."""
        key = storage(tensor)
        if key is not None:
            held = self._live.setdefault(key, [])
            held.append(weakref.ref(tensor))
            if len(held) > self._limit.get(key, 32):  # prune rarely, else thousands of slices take quadratic time
                held[:] = {id(t): r for r in held if (t := r()) is not None}.values()
                self._limit[key] = 2 * len(held) + 32

    def overlapping(self, written: Tensor) -> list[Tensor]:
        """The other live tensors that share an element with `written`."""
        return [t for t in self.sharing(written) if t is not written and _overlap(written, t)]

    def sharing(self, tensor: Tensor) -> list[Tensor]:
        """The live tensors in the memory of `tensor`, itself included if it was added."""
        key = storage(tensor)
        found = [r() for r in self._live.get(key, ())] if key is not None else []
        return list({id(t): t for t in found if t is not None}.values())


def storage(tensor: Tensor) -> int | None:
    """Identity of the memory of a tensor; None if it has no single one."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return None


def _overlap(a: Tensor, b: Tensor) -> bool:
    if not a.numel() or not b.numel():
        return False
    total = a.untyped_storage().nbytes() // a.element_size()
    if a.dtype != b.dtype or total > _EXACT or a.numel() == total or b.numel() == total:
        return True
    marked = torch.zeros(total, dtype=torch.bool)
    marked.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marked.as_strided(b.shape, b.stride(), b.storage_offset()).any())
