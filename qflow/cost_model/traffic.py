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


def traffic(rows: Sequence[OpFeatures], onchip_mb: float | None) -> Traffic:
    """Bytes a frame of operators in order of execution; `onchip_mb` (10^6 bytes) None if unknown."""
    sizes = _sizes(rows)
    roots = _roots(rows)
    last: dict[str, int] = {}
    for i, row in enumerate(rows):
        for name in (row.work.name, *row.work.producers):
            last[roots[name]] = i
    last.update(dict.fromkeys([roots[r.work.name] for r in rows if r.work.leaving], len(rows)))
    spilled, peak = _spills(rows, sizes, roots, last, None if onchip_mb is None else onchip_mb * 1e6)
    return Traffic(
        weight_bytes=sum({r.work.weight or r.work.name: r.weight_bytes for r in rows}.values()),
        input_bytes=sum(sizes[r.work.name] for r in rows if r.work.kind == OpKind.input),
        output_bytes=sum(sizes[r.work.name] for r in rows if r.work.leaving),
        spilled_bytes=2 * sum(sizes[name] for name in spilled),
        lower_bound=onchip_mb is None,
        peak_bytes=peak,
        by_op={
            r.work.name: (
                sum(sizes[p] for p in r.work.producers),
                sizes[r.work.name],
                2 * sizes[r.work.name] if r.work.name in spilled else 0,
            )
            for r in rows
        },
    )


def _sizes(rows: Sequence[OpFeatures]) -> dict[str, int]:
    """Bytes of every operator's result; without a quantizer it has the dtype that it reads, after a GEMM int32."""
    sizes = {}
    for row in rows:
        bits = row.output_dtype.bits if row.output_dtype else 32 if row.work.gemm else row.input_dtype.bits
        sizes[row.work.name] = 0 if row.work.kind == OpKind.constant else row.work.elements * bits // 8
    return sizes


def _roots(rows: Sequence[OpFeatures]) -> dict[str, str]:
    """Operator -> the operator that owns the memory of its result: itself, or for a view the operator viewed."""
    roots: dict[str, str] = {}
    for row in rows:
        work = row.work
        view = work.kind == OpKind.move and len(work.producers) == 1 and work.elements == work.input_elements[0]
        roots[work.name] = roots[work.producers[0]] if view else work.name
    return roots


def _spills(
    rows: Sequence[OpFeatures],
    sizes: Mapping[str, int],
    roots: Mapping[str, str],
    last: Mapping[str, int],
    capacity: float | None,
) -> tuple[set[str], int]:
    """The results that are spilled, and the largest sum of bytes in memory at once."""
    alive: set[str] = set()
    spilled: set[str] = set()
    peak = 0
    for i, row in enumerate(rows):
        at_work = {roots[row.work.name], *(roots[p] for p in row.work.producers)}
        alive |= {roots[row.work.name]}
        peak = max(peak, sum(sizes[name] for name in alive))
        held = sum(sizes[name] for name in alive - spilled)
        order = sorted(alive - spilled, key=lambda name: (name in at_work, -last[name], -sizes[name]))
        for name in order:
            if capacity is None or held <= capacity:
                break
            spilled.add(name)
            held -= sizes[name]
        alive = {name for name in alive if last[name] > i}
    return spilled, peak
