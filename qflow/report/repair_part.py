"""The part of a study's report that shows what the repair tried, kept and refused, and why."""

from __future__ import annotations

from qflow.repair.base.contract import KEPT, RepairTable, Row
from qflow.report.page import Cell, cell, folded, paragraph, table

HEADER = ("step", "parts", "verdict", "reason", "error before", "after", "change", "noise")


def repair_part(record: RepairTable) -> str:
    """Return the table of all attempts, and what was changed in each part of those that were kept."""
    words = record.view().title + "."
    if record.held_out:
        words += (
            " The error of a sample is the distance of the quantized outputs from the float ones, over their usual "
            "size. Change and noise are of the differences sample by sample; what is not better beyond twice the noise "
            "is taken back."
        )
    changed = [
        [cell(row.step), cell(part, "wide"), cell(what, "wide")]
        for row in record.kept
        for part, what in row.changed.items()
    ]
    count = f"{len(changed)} part{'s' * (len(changed) != 1)}"
    parts = folded(f"What was changed in {count}", table(("step", "part", "change"), changed))
    return paragraph(words) + table(HEADER, list(map(_row, record.rows))) + (parts if changed else "")


def _row(row: Row) -> list[Cell]:
    first, *others = row.parts or ("",)
    name = f"{first} and {len(others)} more" if others else first
    return [
        cell(row.step),
        cell(name, "wide"),
        cell(row.verdict, "good" if row.verdict == KEPT else ""),
        cell(row.reason, "wide"),
        *(cell(value) for value in (row.before, row.after, row.change, row.noise)),
    ]
