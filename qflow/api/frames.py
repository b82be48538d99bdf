"""Conversion of records to pandas frames."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from qflow.analysis.badcases.files import SavedBadcases
from qflow.analysis.measures.tables import BadcaseTable
from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    import pandas


def to_frame(record: Any) -> pandas.DataFrame:
    """Return a record of an analysis, or a sequence of records, as a frame with one row each and one column per field.

    A field of pairs (name, value) becomes one column per name: `outputs.0`, `figures.scale`. For bad cases, a row is
    one of the worst samples of an output under a metric, with rank 0 for the worst. Raises ConfigError for anything
    that is not a record.
    """
    import pandas  # takes a second to load

    return pandas.DataFrame(_rows(record))


def _rows(record: Any) -> list[dict[str, Any]]:
    if isinstance(record, BadcaseTable):
        return [
            {"output": output, "metric": metric, "rank": rank, **_place(record, sample), "value": value}
            for output, row in record.top.items()
            for metric, worst in row.items()
            for rank, (sample, value) in enumerate(worst)
        ]
    if isinstance(record, SavedBadcases):
        return [
            {"output": output, "metric": metric, "rank": 0, "sample": sample}
            for output, row in record.index.items()
            for metric, sample in row.items()
        ]
    rows = getattr(record, "rows", record)
    if not isinstance(rows, (list, tuple)) or not all(map(dataclasses.is_dataclass, rows)):
        raise ConfigError(
            f"A frame is made of what QuantAnalysis or qflow.check returns, but got {type(record).__name__}."
        )
    return [_flat(row) for row in rows]


def _place(table: BadcaseTable, sample: int) -> dict[str, int]:
    frame = table.frame(sample)
    return {"sample": sample} if frame is None else {"sample": sample, "sequence": frame[0], "frame": frame[1]}


def _flat(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if str(field.type).startswith("tuple[tuple["):
            found |= {f"{field.name}.{name}": number for name, number in value}
        else:
            found[field.name] = value
    return found
