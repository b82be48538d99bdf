"""What was measured of a network, and its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BEYOND = 2.0  # standard errors
REPAIRS = ("none", "basic", "all")
"""The repairs before which mixes are searched."""


@dataclass(frozen=True)
class Result:
    """A network after some steps, all operators at int8."""

    drop: float
    noise: float
    """Standard error of the difference to the drop without a repair, on the same samples."""
    error: float
    """Relative error of the outputs."""
    passes: float
    """Passes over the calibration samples that the repair took (FFE)."""


@dataclass(frozen=True)
class Record:
    """A network at one number of bits of its weights."""

    network: str
    words: str
    bits: int
    located: bool
    metric: str
    float_metric: float
    samples: int
    calibration: int
    drop: float
    noise: float
    """Standard error of the int8 drop."""
    error: float
    results: Mapping[str, Result]
    """By step, `basic`, `without training`, and `all`."""
    int16: tuple[int | None, ...]
    """Fewest int16 operators that meet the goal, in the order of REPAIRS; None if no measured mix meets it."""
    int16_drop: tuple[float, ...]
    """The drop with all outputs at int16 that may be, likewise."""
    least: tuple[float, ...]
    """Least drop at 1.10 times the time of all int8, likewise; NaN if the answer has no places."""
    seconds: float
    peer: Mapping[str, float] = field(default_factory=dict)
    """Drop by step of another tool, `int8` without a step."""


def worse(record: Record, result: Result) -> bool:
    """True if `result` loses more than the model without a repair, beyond the paired noise. Where that one is better
    than float by chance, coming back to float is no loss.
    """
    return max(result.drop, 0.0) - max(record.drop, 0.0) > BEYOND * result.noise


def append(path: Path, record: Record) -> None:
    """Add a record to a file of one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(asdict(record)) + "\n")


def read(path: Path) -> list[Record]:
    """The records of a file, the last of each network and number of bits; none if there is no file."""
    if not path.exists():
        return []
    found: dict[tuple[str, int], Record] = {}
    for line in path.read_text().splitlines():
        fields: dict[str, Any] = json.loads(line)
        fields["results"] = {label: Result(**values) for label, values in fields["results"].items()}
        pairs = {name: tuple(fields[name]) for name in ("int16", "int16_drop", "least")}
        record = Record(**{**fields, **pairs})
        found[record.network, record.bits] = record
    return list(found.values())
