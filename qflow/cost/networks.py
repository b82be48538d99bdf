"""Networks whose BPU time was measured: totals of their deployed graphs, read from a table."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qflow.core.errors import ConfigError

COLUMNS = {
    "gemms": "n_gemm_ops",
    "gmacs": "gmacs_conv_fc_pad16",
    "attention_gmacs": "gmacs_attention_matmul",
    "softmax_melem": "softmax_melem",
    "lut_melem": "lut_act_melem",
    "weight_mb": "weights_melem",
}
CLOCKS = {"nash-e": 1.0, "nash-m": 1.5}
"""GHz."""


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
    """March -> BPU time of one frame at saturation."""


def read_networks(path: str | Path) -> tuple[list[Network], list[str]]:
    """Networks of a CSV file with the columns of `COLUMNS`, `model`, and times `t_bpu_ms..._nash_e` / `..._nash_m`.

    Also lists, with the reason, those that a fit does not take: other than int8, or without a time. An optional column
    `family` overrules the family that the name gives. Raises ConfigError in one line for a file that is no such table.
    """
    place = Path(path)
    try:
        with place.open(newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"A fit reads a CSV file of networks, but got {place}: {error}. Name one.") from error
    header = [str(key) for key in table[0]] if table else []
    marches = {column: m for column in header for m in CLOCKS if _is_time(column, m)}
    missing = [c for c in ("model", "dtype", *COLUMNS.values()) if c not in header]
    if missing or not marches:
        wanted = ", ".join(missing) or "a time column t_bpu_ms_..._nash_e or ..._nash_m"
        raise ConfigError(f"A table of networks has the column {wanted}, but got none in {place}. Add it.")
    networks, skipped = [], []
    for line, row in enumerate(table, 2):
        found = _network(row, marches, f"{place}, line {line}")
        if found.dtype != "int8" or not found.times:
            skipped.append(f"{found.name}: {found.dtype if found.dtype != 'int8' else 'no time'}")
        networks.append(found)
    return networks, skipped


def _is_time(column: str, march: str) -> bool:
    return column.startswith("t_bpu_ms") and column.endswith(march.replace("-", "_"))


def _network(row: Mapping[str, str | None], marches: Mapping[str, str], where: str) -> Network:
    values = {field: _number(row.get(column), column, where) for field, column in COLUMNS.items()}
    lost = [COLUMNS[field] for field, value in values.items() if value is None]
    if lost:
        raise ConfigError(f"A network needs a number for {lost[0]}, but got none in {where}. Fill it in.")
    times = {march: t for column, march in marches.items() if (t := _number(row.get(column), column, where))}
    name = (row["model"] or "").strip()
    return Network(
        name=name,
        family=(row.get("family") or "").strip() or family_of(name),
        dtype=(row["dtype"] or "").strip(),
        times=times,
        **values,  # type: ignore[arg-type]
    )


def _number(text: str | None, column: str, where: str) -> float | None:
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise ConfigError(f"A network's {column} is a number of at least 0, but got {text!r} in {where}. Mend it.")
    return value


def family_of(name: str) -> str:
    """Family by a network's name: `YOLO11l Seg` is yolo11, `efficientnet_lite0` efficientnet, `resnet152` resnet."""
    first = re.split(r"[\s_-]", name.strip().lower())[0]
    sized = re.fullmatch(r"(yolo[a-z]*\d+)[a-z]*", first)
    if sized:
        return sized.group(1)
    return re.sub(r"\d{2,}$", "", first) or first
