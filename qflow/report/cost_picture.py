"""A cost report as a picture (matplotlib): the time of the operators, written as a PNG and returned as a Figure."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from qflow.cost_model.records import CostReport
from qflow.cost_model.table import by_time, fixed_ms
from qflow.report.array_pictures import nothing, save
from qflow.report.drawing import BLUE, GREEN, GREY, ORANGE, RED, shorten

COLORS = {"TAE": BLUE, "VAE": ORANGE, "VPU": RED, "AAE": GREEN}
"""Unit of the BPU -> colour; the others are grey."""


def cost_bars(report: CostReport, path: Path, top: int = 30) -> Figure:
    """The `top` costliest operators as bars with their intervals; a note sums up the rest."""
    ops = [op for op in by_time(report) if op.ms > 0]
    shown, rest = ops[:top], ops[top:]
    figure = Figure(figsize=(11, 2.4 + 0.24 * max(len(shown), 3)), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(
        f"{report.march}: {report.latency_ms:.3f} ms [{report.low_ms:.3f}, {report.high_ms:.3f}], one thread; "
        f"{report.bpu_ms:.3f} ms on the BPU",
        fontsize=12,
    )
    if not shown:
        return save(nothing(figure, axes, "No operator takes time."), path)
    for place, op in enumerate(shown):
        axes.barh(place, op.ms, height=0.75, color=COLORS.get(op.engine, GREY), ec="#222222", lw=0.6)
        below, above = op.ms - op.low_ms, op.high_ms - op.ms
        axes.errorbar(op.ms, place, xerr=[[below], [above]], color="black", capsize=2.5, lw=1.0)
        axes.annotate(
            f"{op.share:.1%}  {op.input_dtype}", (op.high_ms, place), xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
    axes.set(xlim=(0.0, 1.2 * max(op.high_ms for op in shown)), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [shorten(op.op, 60) for op in shown], fontsize=8, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    others = f"; {len(rest)} others: {sum(op.ms for op in rest):.4f} ms together" if rest else ""
    note = f"a run by itself: {fixed_ms(report):.4f} ms{others}"
    axes.set_xlabel(f"time (ms), share of the BPU's time\n{note}", fontsize=9)
    engines = dict.fromkeys(op.engine for op in shown)
    handles = [Patch(fc=COLORS.get(engine, GREY), ec="#222222", label=engine) for engine in engines]
    interval = Line2D([], [], color="black", marker="|", label="interval")
    figure.legend(handles=[*handles, interval], frameon=False, fontsize=9, loc="outside lower center", ncols=7)
    return save(figure, path)
