"""Reads a table of networks whose BPU time was measured, with the totals of their deployed graphs."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from qflow.core.errors import ConfigError
from qflow.core.text_file import read_text

COLUMNS = {
    "gemms": "n_gemm_ops",
    "gmacs": "gmacs_conv_fc_pad16",
    "attention_gmacs": "gmacs_attention_matmul",
    "softmax_melem": "softmax_melem",
    "lut_melem": "lut_act_melem",
    "weight_mb": "weights_melem",
}
OPTIONAL = {"resize_melem": "resize_melem", "outputs": "outputs"}
"""Columns that a table may lack: resizes then count as 0, and the time on the host is not fitted."""
CLOCKS = {"nash-e": 1.0, "nash-m": 1.5}
"""GHz."""
TIMES = (1e-6, 1e6)
"""Bounds of a network's time, in ms."""
TOTALS = (0.0, 1e9)
"""Bounds of a total, in the unit of its column."""


@dataclass(frozen=True)
class Network:
    """One network's totals over its deployed graph (10^9 MACs, 10^6 elements, 10^6 weights), and its times in ms."""

    name: str
    family: str
    dtype: str
    gemms: float
    gmacs: float
    attention_gmacs: float
    softmax_melem: float
    lut_melem: float
    weight_mb: float
    times: Mapping[str, float]
    """March -> BPU time of one frame when the BPU is saturated."""
    resize_melem: float = 0.0
    outputs: float | None = None
    """Number of output tensors."""
    latencies: Mapping[str, float] = field(default_factory=dict)
    """March -> latency of one frame in ms with one thread; empty if it was not measured, as the next."""
    latencies_2: Mapping[str, float] = field(default_factory=dict)
    """The same with two threads."""


def read_networks(path: str | Path) -> tuple[list[Network], list[str]]:
    """Networks of a CSV file with the columns of `COLUMNS`, `model`, and times `t_bpu_ms..._nash_e` / `..._nash_m`.

    Also lists, with the reason, what a fit does not use: networks other than int8, without a time or without one of
    the totals, and time columns of no known march. Optional columns: `family` replaces the family that the name gives;
    `resize_melem` and `outputs` are further totals; `latency_ms...` and `latency_2_ms...` are latencies with one and
    two threads; `not_saturated` names marches whose time was measured with too few threads to be that of the BPU.
    Raises ConfigError in one line for a file that is no such table.
    """
    place = Path(path)
    try:
        reader = csv.DictReader(StringIO(read_text(place, "A fit reads a CSV file of networks"), newline=""))
        header, table = [*(reader.fieldnames or ())], list(reader)
    except csv.Error as error:
        raise ConfigError(f"A fit reads a CSV file of networks, but got {place}: {error}. Name one.") from error
    marches = _marches(header, place, "t_bpu_ms")
    missing = [c for c in ("model", "dtype", *COLUMNS.values()) if c not in header]
    if missing or not marches:
        wanted = ", ".join(missing) or "a time column t_bpu_ms_..._nash_e or ..._nash_m"
        raise ConfigError(f"A table of networks has the column {wanted}, but got none in {place}. Add it.")
    networks = []
    skipped = [f"{c}: a time of no march" for c in header if c.startswith("t_bpu_ms") and c not in marches]
    skipped += [] if "resize_melem" in header else ["resize_melem: no such column, so resizes count as 0"]
    latencies = [_marches(header, place, start) for start in ("latency_ms", "latency_2_ms")]
    for line, row in enumerate(table, 2):
        found, reason = _network(row, marches, latencies, f"{place}, line {line}")
        name = (row["model"] or "").strip() or f"line {line}"
        skipped += [f"{name}: {reason}"] if reason else []
        networks += [found] if found else []
    return networks, skipped


def _marches(header: Sequence[str], place: Path, start: str) -> dict[str, str]:
    """Time column whose name has this `start` -> its march. Raises ConfigError if two columns are of one march."""
    found: dict[str, str] = {}
    for march in CLOCKS:
        ending = march.replace("-", "_")
        columns = [c for c in header if c.startswith(start) and c.endswith(ending)]
        if len(columns) > 1:
            raise ConfigError(
                f"A table has one time column for {march}, but got {', '.join(columns)} in {place}. Keep one."
            )
        found |= dict.fromkeys(columns, march)
    return found


def _network(
    row: Mapping[str, str | None], marches: Mapping[str, str], latencies: Sequence[Mapping[str, str]], where: str
) -> tuple[Network | None, str | None]:
    """The network, or None if a total is missing, and why a fit does not use it."""
    dtype = (row["dtype"] or "").strip().lower()
    known = _times(row, marches, where)
    idle = [march for march in known if march in (row.get("not_saturated") or "")]
    values = {field: _number(row[column], column, TOTALS, where) for field, column in COLUMNS.items()}
    more = {field: _number(row.get(column), column, TOTALS, where) for field, column in OPTIONAL.items()}
    lost = [COLUMNS[field] for field, value in values.items() if value is None]
    reasons = [dtype or "no dtype"] if dtype != "int8" else ["no time"] if not known else [f"no {c}" for c in lost]
    reasons += [f"not saturated on {march}" for march in idle]
    reason = reasons[0] if reasons else None
    if lost:
        return None, reason
    name = (row["model"] or "").strip()
    family = (row.get("family") or "").strip() or family_of(name)
    one, two = (_times(row, columns, where) for columns in latencies)
    return Network(
        name=name,
        family=family,
        dtype=dtype,
        times={march: t for march, t in known.items() if march not in idle},
        resize_melem=more["resize_melem"] or 0.0,
        outputs=more["outputs"],
        latencies=one,
        latencies_2=two,
        **values,  # type: ignore[arg-type]
    ), reason


def _times(row: Mapping[str, str | None], columns: Mapping[str, str], where: str) -> dict[str, float]:
    found = {march: _number(row[column], column, TIMES, where) for column, march in columns.items()}
    return {march: t for march, t in found.items() if t is not None}


def _number(text: str | None, column: str, ends: tuple[float, float], where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not ends[0] <= value <= ends[1]:
        rule = f"A network's {column} is a number from {ends[0]:g} to {ends[1]:g}"
        raise ConfigError(f"{rule}, but got {text!r} in {where}. Correct it.")
    return value


def family_of(name: str) -> str:
    """Family from a network's name: `YOLO11l Seg` is yolo11, `efficientnet_lite0` efficientnet, `resnet152` resnet."""
    first = re.split(r"[\s_-]", name.strip().lower())[0]
    sized = re.fullmatch(r"(yolo[a-z]*\d+)[a-z]*", first)
    if sized:
        return sized.group(1)
    return re.sub(r"\d{2,}$", "", first) or first
