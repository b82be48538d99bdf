"""Bytes that a frame moves through DDR: weights, inputs and outputs once, spilled activations twice.

    bytes = weights + inputs + outputs + spilled;     GB/s at a frame rate = bytes * fps / 2^30

Activations occupy on-chip memory from their producer to their last reader. If they exceed it, the one whose last reader
comes latest is spilled first (written out and read back once, 2 x its bytes), and those of the operator that is running
are spilled last of all. The size of that memory is not published for J6E and J6M: without it nothing spills, and the
traffic is a lower bound. Views share the memory of what they view. No public measurement checks any of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qflow.core.graph import OpKind
from qflow.cost_model.features import OpFeatures
from qflow.cost_model.work import OpWork


@dataclass(frozen=True)
class Traffic:
    """Bytes a frame by purpose; `by_op` holds (input, output, spilled) bytes of every operator."""

    weight_bytes: int
    """The weights of a module that is called more than once count once."""
    input_bytes: int
    output_bytes: int
    spilled_bytes: int
    lower_bound: bool
    """True if the on-chip memory is unknown, so that nothing spills."""
    peak_bytes: int
    """Largest sum of activations in memory at once."""
    by_op: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The sum of all bytes."""
        return self.weight_bytes + self.input_bytes + self.output_bytes + self.spilled_bytes

    def bandwidth(self, fps: float) -> float:
        """GB/s (2^30 bytes) at `fps` frames a second."""
        return self.bytes * fps / 2**30


@dataclass(frozen=True)
class Lifetimes:
    """What is in memory when, whatever the dtypes are. Operators are places in the order of execution."""

    roots: tuple[int, ...]
    """The operator that owns the memory of a result: itself, or for a view the operator viewed."""
    producers: tuple[tuple[int, ...], ...]
    last: tuple[int, ...]
    """The last reader of the memory that an operator owns; for a model output, behind the last operator."""
    ending: tuple[tuple[int, ...], ...]
    """The owners of memory that is read for the last time at each operator."""


def lifetimes(works: Sequence[OpWork]) -> Lifetimes:
    """The lifetimes of the results of `works`."""
    places = {work.name: i for i, work in enumerate(works)}
    producers = tuple(tuple(places[name] for name in work.producers) for work in works)
    roots: list[int] = []
    for i, work in enumerate(works):
        view = work.kind == OpKind.move and len(work.producers) == 1 and work.elements == work.input_elements[0]
        roots.append(roots[producers[i][0]] if view else i)
    last = list(range(len(works)))
    for i, read in enumerate(producers):
        for place in (i, *read):
            last[roots[place]] = i
    for i, work in enumerate(works):
        if work.leaving:
            last[roots[i]] = len(works)
    ending: list[list[int]] = [[] for _ in works]
    for root in set(roots):
        if last[root] < len(works):
            ending[last[root]].append(root)
    return Lifetimes(tuple(roots), producers, tuple(last), tuple(map(tuple, ending)))


def traffic(rows: Sequence[OpFeatures], onchip_mb: float | None, known: Lifetimes | None = None) -> Traffic:
    """Bytes a frame of operators in order of execution; `onchip_mb` (10^6 bytes) None if unknown.

    `known` are the lifetimes of the operators, which need not be found again for other dtypes.
    """
    works = [row.work for row in rows]
    sizes, held = [_size(row) for row in rows], known or lifetimes(works)
    spilled, peak = _spills(sizes, held, None if onchip_mb is None else onchip_mb * 1e6)
    return Traffic(
        weight_bytes=sum({w.weight or w.name: row.weight_bytes for w, row in zip(works, rows, strict=True)}.values()),
        input_bytes=sum([size for w, size in zip(works, sizes, strict=True) if w.kind == OpKind.input]),
        output_bytes=sum([size for w, size in zip(works, sizes, strict=True) if w.leaving]),
        spilled_bytes=2 * sum([sizes[place] for place in spilled]),
        lower_bound=onchip_mb is None,
        peak_bytes=peak,
        by_op={
            work.name: (
                sizes[read[0]] if len(read) == 1 else sum([sizes[place] for place in read]),
                sizes[i],
                2 * sizes[i] if i in spilled else 0,
            )
            for i, (work, read) in enumerate(zip(works, held.producers, strict=True))
        },
    )


def _size(row: OpFeatures) -> int:
    """Bytes of an operator's result; without a quantizer it has the dtype that it reads, after a GEMM int32."""
    if row.work.kind == OpKind.constant:
        return 0
    bits = row.output_dtype.bits if row.output_dtype else 32 if row.work.gemm else row.input_dtype.bits
    return row.work.elements * bits // 8


def _spills(sizes: Sequence[int], held: Lifetimes, capacity: float | None) -> tuple[set[int], int]:
    """The results that are spilled, and the largest sum of bytes in memory at once."""
    alive: set[int] = set()
    spilled: set[int] = set()
    peak = total = 0
    for i, root in enumerate(held.roots):
        if root not in alive:
            alive.add(root)
            total += sizes[root]
        peak = max(peak, total)
        if capacity is not None and total > capacity:
            _spill(alive, spilled, sizes, held, i, capacity)
        for ended in held.ending[i]:
            alive.discard(ended)
            total -= sizes[ended]
    return spilled, peak


def _spill(
    alive: set[int], spilled: set[int], sizes: Sequence[int], held: Lifetimes, place: int, capacity: float
) -> None:
    """Add to `spilled` until what is alive beside it fits at the operator at `place`."""
    at_work = {held.roots[place], *(held.roots[p] for p in held.producers[place])}
    inside = sum(sizes[root] for root in alive - spilled)
    for root in sorted(alive - spilled, key=lambda root: (root in at_work, -held.last[root], -sizes[root])):
        if inside <= capacity:
            break
        spilled.add(root)
        inside -= sizes[root]
