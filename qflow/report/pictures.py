"""The analysis as picture files (matplotlib): each function takes a table or arrays, writes a PNG, returns the Figure.

Import this module only where something is drawn, not at the top of a command: matplotlib takes a while to load.
Everything that a colour shows is also shown by a shape or a hatch. Pictures of arrays are in array_pictures.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from qflow.analysis.measures.tables import LayerTable, SensitivityRow, SensitivityTable
from qflow.report.array_pictures import nothing, save
from qflow.report.drawing import (
    BLUE,
    GREEN,
    RED,
    bar_color,
    common_prefix,
    log_points,
    log_range,
    shorten,
    start_position,
)

HATCHES = {"qint8": "", "qint16": "////", "float16": "...."}
WORST = 5
"""Operators that are named because of their own error."""


def error_along_network(table: LayerTable, path: Path) -> Figure:
    """Accumulated and single-operator error of every operator in the order of the model, on a log axis.

    Filled dots are operators with a quantizer; the operator where the error first grows and the worst single operators
    are named. Zeros are drawn on the lower edge and infinities on the upper one, as a log axis has no place for them.
    """
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(f"Error along the network: {len(table.rows)} operator calls, samples: {table.samples}", fontsize=12)
    low, high = log_range([value for row in table.rows for value in (row.error, row.single_error)])
    total = log_points([row.error for row in table.rows], low, high)
    single = log_points([row.single_error for row in table.rows], low, high)
    if not total and not single:
        return save(nothing(figure, axes, "No operator has an error to show."), path)
    room = max((high / low) ** 0.16, 2.0)  # above the points, for the numbers of the worst
    axes.set(yscale="log", ylim=(low / 1.5, high * room), xlim=(-0.6, len(table.rows) - 0.4), ylabel="relative error")
    axes.grid(axis="y", alpha=0.3)
    size = 6.0 if len(table.rows) <= 100 else 3.5
    axes.plot(*_columns(total), color=BLUE, lw=1.2, alpha=0.6, label="accumulated error")
    dots: dict[str, Any] = {"color": BLUE, "ls": "", "marker": "o", "ms": size}
    quantized = [point for point in total if table.rows[point[0]].quantizer]
    others = [point for point in total if not table.rows[point[0]].quantizer]
    axes.plot(*_columns(quantized), **dots, label="of an operator with a quantizer")
    axes.plot(*_columns(others), **dots, mfc="white", label="of one without")
    axes.plot(*_columns(single), color=RED, ls="", marker="D", ms=size * 0.8, label="error of the operator alone")
    _name_operators(axes, [row.mod_name for row in table.rows])
    _mark_start(axes, table)
    worst = _number_worst(axes, table, single)
    _legend(figure, axes.get_legend_handles_labels()[0], loc="outside lower right")
    if worst:
        title = "Largest errors of an operator alone"
        _legend(figure, worst, loc="outside lower left", title=title, alignment="left")
    return save(figure, path)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _name_operators(axes: Axes, names: Sequence[str]) -> None:
    """Write names below the axis, as many as are readable side by side; their common beginning is written once."""
    places = list(range(0, len(names), math.ceil(len(names) / 40)))
    prefix = common_prefix(names)
    angle, fit = (20, 36) if len(names) <= 8 else (90, 32)
    labels = [shorten(names[i][len(prefix) :], fit) for i in places]
    axes.set_xticks(places, labels, rotation=angle, fontsize=8, ha="right" if angle < 90 else "center")
    for tick in axes.get_xticklabels():
        tick.set_parse_math(False)
    axes.xaxis.set_minor_locator(FixedLocator(range(len(names))))
    notes = [f"1 in {places[1]} is named"] if len(places) < len(names) else []
    notes += [f"all names begin with {prefix}"] if prefix else []
    more = f" ({', '.join(notes)})" if notes else ""
    axes.set_xlabel(f"operator, in the order of the model{more}", parse_math=False)


def _mark_start(axes: Axes, table: LayerTable) -> None:
    place = start_position(table)
    if place is None:
        return
    axes.axvline(place, color=GREEN, ls="--", lw=1.5, label="_start")
    side = "left" if place < len(table.rows) / 2 else "right"  # the text runs towards the middle of the picture
    axes.annotate(
        f"error starts to grow: {shorten(table.start, 60)}",
        (place, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        ha=side,
        color=GREEN,
        weight="bold",
        fontsize=9,
        parse_math=False,
    )


def _number_worst(axes: Axes, table: LayerTable, single: Sequence[tuple[int, float]]) -> list[Line2D]:
    """Number the worst operators along the upper edge, side by side; returns the legend that names them."""
    worst = sorted((p for p in single if table.rows[p[0]].single_error), key=lambda point: -point[1])[:WORST]
    ranks = {x: rank for rank, (x, _) in enumerate(worst, start=1)}
    for (x, y), place in zip(sorted(worst), _spread([x for x, _ in sorted(worst)], len(table.rows)), strict=True):
        axes.annotate(
            str(ranks[x]),
            (x, y),
            xytext=(place, 0.95),
            textcoords=axes.get_xaxis_transform(),
            ha="center",
            va="center",
            color=RED,
            weight="bold",
            bbox={"fc": "white", "ec": "none", "pad": 1},
            arrowprops={"arrowstyle": "-", "color": RED, "lw": 0.8, "alpha": 0.7, "shrinkB": 2},
        )
    handles = []
    for rank, (x, _) in enumerate(worst, start=1):
        row = table.rows[x]
        kind = f"{row.base_op_type.rsplit('.', 1)[-1]}, {row.quant_dtype or 'no quantizer'}"
        text = f"{row.single_error:.3g}  {shorten(row.operator, 90)}  ({kind})"
        handles.append(Line2D([], [], color=RED, ls="", marker=f"${rank}$", label=text))
    return handles


def _spread(places: Sequence[int], count: int) -> list[float]:
    """Positions for labels near `places` (ascending) that do not overlap on an axis of `count` operators."""
    gap = 0.018 * count
    free: list[float] = []
    for place in places:
        free.append(max(float(place), free[-1] + gap) if free else float(place))
    beyond = max(free[-1] - (count - 1), 0.0) if free else 0.0
    return [place - beyond for place in free]


def _legend(figure: Figure, handles: Sequence[Any], **place: Any) -> None:
    for text in figure.legend(handles=handles, frameon=False, fontsize=9, **place).get_texts():
        text.set_parse_math(False)  # names may hold a $


def sensitivity_bars(table: SensitivityTable, path: Path, top: int = 40) -> Figure:
    """The most sensitive quantizers, with a bar for each dtype, at most `top` bars, and the spread over bad cases; a
    note sums up the rest.
    """
    rows = table.by_quantizer()
    shown, rest = rows[:top], rows[top:]
    figure = Figure(figsize=(11, 2.2 + 0.24 * max(len(shown), 3)), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(
        f"Sensitivity: {table.metric}, {table.merge}, samples: {table.samples}", fontsize=12, parse_math=False
    )
    if not shown:
        return save(nothing(figure, axes, "The table has no rows."), path)
    for place, row in enumerate(shown):
        _bar(axes, place, row)
    reach = max((row.score + row.spread for row in shown if math.isfinite(row.score + row.spread)), default=0.0)
    least = min((row.score for row in shown if math.isfinite(row.score)), default=0.0)
    axes.set(xlim=(min(least, 0.0) * 1.1, reach * 1.12 if reach > 0 else 1.0), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [shorten(row.op_name, 60) for row in shown], fontsize=8)
    for tick in axes.get_yticklabels():
        tick.set_parse_math(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"score, larger is more sensitive\n{_rest_note(rows, rest)}", fontsize=9)
    if all(row.score == 0 for row in rows):
        axes.text(0.5, 0.5, "Every score is 0.", transform=axes.transAxes, ha="center", fontsize=12, color=RED)
    _legend(figure, _bar_legend(shown), loc="outside lower center", ncols=7)
    return save(figure, path)


def _bar(axes: Axes, place: int, row: SensitivityRow) -> None:
    if not math.isfinite(row.score):
        axes.text(0.0, place, f" {row.score}", va="center", fontsize=8, color=RED)
        return
    color = bar_color(row.sensitive_type, row.exact)
    axes.barh(
        place, row.score, height=0.75, color=color, ec="#222222", lw=0.6, hatch=HATCHES.get(row.quant_dtype, "xx")
    )
    if row.spread > 0:
        below = min(row.spread, max(row.score, 0.0))  # a distance is never below 0
        axes.errorbar(row.score, place, xerr=[[below], [row.spread]], color="black", capsize=2.5, lw=1.1)
    end = max(row.score, 0.0) + max(row.spread, 0.0)
    label = f"{row.score:.3g}  {row.quant_dtype}"
    axes.annotate(label, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _bar_legend(rows: Sequence[SensitivityRow]) -> list[Any]:
    kinds = dict.fromkeys(row.sensitive_type for row in rows)
    dtypes = dict.fromkeys(row.quant_dtype for row in rows)
    handles: list[Any] = [Patch(fc=bar_color(kind, True), ec="#222222", label=kind) for kind in kinds]
    handles += [Patch(fc="white", ec="#222222", hatch=HATCHES.get(dtype, "xx"), label=dtype) for dtype in dtypes]
    if any(not row.exact for row in rows):
        handles.append(Patch(fc="#d5d5d5", ec="#222222", label="lighter: estimated"))
    if any(row.spread > 0 for row in rows):
        handles.append(Line2D([], [], color="black", marker="|", label="spread over bad cases"))
    return handles


def _rest_note(rows: Sequence[SensitivityRow], rest: Sequence[SensitivityRow]) -> str:
    if not rest:
        return f"all {len(rows)} rows are shown"
    tail, whole = sum(row.score for row in rest), sum(row.score for row in rows)
    share = f" ({tail / whole:.2%} of the whole)" if whole > 0 else ""
    return f"not shown: {len(rest)} of {len(rows)} rows, summing to {tail:.3g}{share}"
