"""Helpers that the picture files and the HTML page share: colours, positions on a log axis, short names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from qflow.analysis.measures.tables import LayerTable

# The palette of Okabe and Ito, whose colours are distinct with any colour vision.
BLUE, RED, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#555555"
TYPE_COLORS = {"activation": BLUE, "weight": ORANGE}


def bar_color(kind: str, exact: bool) -> str:
    """Colour of a sensitivity bar; that of an estimated one is lighter."""
    solid = TYPE_COLORS.get(kind, GREY)
    if exact:
        return solid
    parts = [int(solid[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(0.35 * part + 0.65 * 255):02x}" for part in parts)


def log_range(values: Sequence[float | None]) -> tuple[float, float]:
    """Ends of a log axis; zeros and infinities are drawn there, beyond the smallest and largest other value."""
    held = [v for v in values if v is not None and 0.0 < v < math.inf]
    if not held:
        return 1e-6, 1.0
    edged = 0.0 in values, math.inf in values
    return min(held) / (3.0 if edged[0] else 1.0), max(held) * (3.0 if edged[1] else 1.0)


def log_points(values: Sequence[float | None], low: float, high: float) -> list[tuple[int, float]]:
    """(position, height) of every value that is a number; `low` and `high` from `log_range`."""
    return [(i, min(max(v, low), high)) for i, v in enumerate(values) if v is not None and not math.isnan(v)]


def start_position(table: LayerTable) -> int | None:
    """Row of the operator at which the error starts to grow; None if the table names none."""
    rows = [i for i, row in enumerate(table.rows) if table.start and table.start == row.quantizer]
    rows += [i for i, row in enumerate(table.rows) if table.start and table.start == row.mod_name]
    return rows[0] if rows else None


def common_prefix(names: Sequence[str]) -> str:
    """The common beginning of all dotted names, up to and including a dot; "" for a single name."""
    if len(set(names)) < 2:
        return ""
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}." for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def shorten(name: str, limit: int) -> str:
    """The end of `name`, its most specific part, in at most `limit` characters."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"
