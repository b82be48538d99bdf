"""Sensitivity tables of the plugin (`output_<name>_<metric>_sensitive_ops.pt`) as qflow's.

Rows are op_name, sensitive_type, op_type, value [, quant_dtype [, flops]], the oldest without the last two. The name of
the file says the metric; by it, values become scores of which a larger one is more sensitive.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflow.analysis.measures.tables import Finding, SensitivityRow, SensitivityTable
from qflow.core.dtype import QDtype
from qflow.core.settings import COMPARISONS
from qflow.imports.dtypes import parse_dtype
from qflow.imports.matching import Names
from qflow.imports.records import MOST_NAMES, NOT_READ, NOT_SURE, ImportFileError, Unmatched

RULE = "A sensitivity table is a list of rows: op_name, sensitive_type, op_type, value, quant_dtype, flops"
_METRIC = re.compile(rf"_(?P<metric>{'|'.join(COMPARISONS)})_sensitive_ops", re.IGNORECASE)
_FLOPS = re.compile(r"(\d{1,18})\(")
NO_METRIC = "the name of the file says no metric: a larger value counts as more sensitive"


def is_table(value: object) -> bool:
    """Return whether a value is a list of rows."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(row, (list, tuple)) for row in value)


def read_rows(value: Sequence[Any], path: Path, names: Names) -> tuple[SensitivityTable, list[Unmatched]]:
    """Return the table under the operators' names, the most sensitive first, and what did not match."""
    if len(value) > MOST_NAMES:
        raise ImportFileError(f"{RULE}, but got {len(value)} rows in {path.name}. Name another file.")
    match = _METRIC.search(path.name)
    metric = next(m for m in COMPARISONS if match is None or m.lower() == match["metric"].lower()) if match else "L1"
    merged = path.name.startswith("output_merged")
    rows: list[SensitivityRow] = []
    unmatched: list[Unmatched] = []
    generated = names.by_order({str(row[0]) for row in value if row and isinstance(row[0], str)})
    for index, cells in enumerate(value):
        row = _row(cells, index, path.name, metric, merged)
        if row is None:
            continue
        place = names.place(row.op_name, generated)
        if place.group == NOT_READ and place.reason.startswith("a value inside"):
            rows.append(row)  # qflow ranks the values inside too
            continue
        if place.group:
            shown = f"{row.op_name} = {', '.join(place.ops)}" if place.group == NOT_SURE else row.op_name
            unmatched.append(Unmatched(place.group, shown, place.reason))
        rows += [replace(row, op_name=op) for op in place.ops]
    if not rows:
        raise ImportFileError(
            f"A sensitivity table names operators of the model, but got {_first(value)} and no other in {path.name}. "
            "Take the table of this model."
        )
    findings = () if match else (Finding("model", "info", NO_METRIC),)
    ordered = tuple(sorted(rows, key=lambda r: -r.score))
    table = SensitivityTable(metric, f"as in {path.name}", 0, True, ordered, "read from a file", findings)
    return table, list(dict.fromkeys(unmatched))


def _row(cells: Sequence[Any], index: int, shown: str, metric: str, merged: bool) -> SensitivityRow | None:
    """Return a row; None for one whose value is not a number (an operator that was not measured)."""
    if not 4 <= len(cells) <= 6 or not isinstance(cells[0], str) or cells[1] not in ("activation", "weight"):
        raise ImportFileError(f"{RULE}, but got another in row {index} of {shown}. Name another file.")
    value = cells[3]
    if hasattr(value, "numel") and value.numel() == 1:
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ImportFileError(f"{RULE}, but got no number as value in row {index} of {shown}. Name another file.")
    if math.isnan(value):
        return None
    dtype = parse_dtype(cells[4]) if len(cells) > 4 else QDtype.qint8
    flops = _FLOPS.match(str(cells[5])[:40]) if len(cells) > 5 else None
    score = float(value) if merged else _score(float(value), metric)
    kind = cells[2].__name__ if isinstance(cells[2], type) else str(cells[2])[:200]
    return SensitivityRow(cells[0], cells[1], kind, score, str(dtype or ""), int(flops[1]) if flops else 0)


def _score(value: float, metric: str) -> float:
    """Return a score that is larger for what is more sensitive: 1 - cosine, noise over signal, or the value itself."""
    if metric == "Cosine":
        return 1.0 - value
    if metric == "SQNR":
        return math.pow(10.0, -max(value, -6000.0) / 20.0)
    return value


def _first(value: Sequence[Any]) -> str:
    return f"{str(value[0][0])[:60]!a}" if value and value[0] else "none"
