"""Comparisons of trials as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qflow.core.errors import ConfigError
from qflow.report.page import Section, cell, document, paragraph, table
from qflow.study.comparison import Comparison

METRICS = ("metric", "first", "other", "change", "noise")
OPERATORS = ("operator", "first", "other", "int8 sensitivity", "first, us", "other, us", "what the difference gains")


def write_page(path: Path, found: Sequence[Comparison]) -> None:
    """Write all comparisons, which have the same first trial. Raises ConfigError if the file cannot be written."""
    sections = [section for one in found for section in _sections(one)]
    others = ", ".join(one.after for one in found)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(f"Compared with {found[0].before}", others, sections), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out is a file that can be written, but got {path}: {error.strerror}.") from error


def _sections(found: Comparison) -> list[Section]:
    hows = [f"Noise: {how}." for how in dict.fromkeys(m.how for m in found.metrics if m.how)]
    texts = [*found.differences, *found.notes, *hows]
    metrics = [
        [cell(m.name, "name"), *map(cell, (m.before, m.after, m.change)), cell(m.verdict)] for m in found.metrics
    ]
    bpu = found.bpu
    ratio = [f"It takes {bpu.ratio:.3f} of the first's BPU time [{bpu.low:.3f}, {bpu.high:.3f}]."] if bpu else []
    operators = [
        [
            *(cell(op.op, "name"), cell(op.before), cell(op.after), cell(op.sensitivity)),
            *(cell(None if ms is None else 1e3 * ms) for ms in (op.before_ms, op.after_ms)),
            cell(op.gain),
        ]
        for op in found.operators
    ]
    count = f"{len(operators)} of {found.count} operators differ."
    return [
        Section(found.after, "".join(map(paragraph, texts)) + table(METRICS, metrics)),
        Section(
            f"Cost and operators of {found.after}",
            "".join(map(paragraph, [*ratio, count])) + (table(OPERATORS, operators) if operators else ""),
        ),
    ]
