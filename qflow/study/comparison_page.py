"""Comparisons of trials as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qflow.core.errors import ConfigError
from qflow.report.table_page import Part, table_page
from qflow.study.comparison import Comparison


def write_page(path: Path, found: Sequence[Comparison]) -> None:
    """Write all comparisons, which have the same first trial. Raises ConfigError if the file cannot be written."""
    parts = [part for one in found for part in _parts(one)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        table_page(path, f"Compared with {found[0].before}", parts)
    except OSError as error:
        raise ConfigError(f"out is a file that can be written, but got {path}: {error.strerror}.") from error


def _parts(found: Comparison) -> list[Part]:
    metrics = [
        [m.name, *(f"{v:.6g}" if v is not None else "-" for v in (m.before, m.after, m.change)), m.verdict]
        for m in found.metrics
    ]
    bpu = found.bpu
    cost = [f"It takes {bpu.ratio:.3f} of the first's BPU time [{bpu.low:.3f}, {bpu.high:.3f}]."] if bpu else []
    hows = [f"Noise: {how}." for how in dict.fromkeys(m.how for m in found.metrics if m.how)]
    rows = [
        [
            op.op,
            op.before,
            op.after,
            "-" if op.sensitivity is None else f"{op.sensitivity:.3g}",
            *("-" if ms is None else f"{1e3 * ms:.3g}" for ms in (op.before_ms, op.after_ms)),
            op.gain,
        ]
        for op in found.operators
    ]
    header = ("operator", "first", "other", "int8 sensitivity", "first, us", "other, us", "what the difference gains")
    return [
        Part(found.after, [*found.notes, *hows], ("metric", "first", "other", "change", "noise"), metrics),
        Part(f"Cost and operators of {found.after}", [*cost, f"{len(rows)} of {found.count} differ."], header, rows),
    ]
