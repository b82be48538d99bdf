"""Pictures of plain arrays (matplotlib): the values of a layer above its quantization grid, and the bad cases."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from numpy.typing import ArrayLike, NDArray

from qflow.report.drawing import BLUE, GREEN, GREY, RED

BANDS = 256
"""Most bands drawn of a grid: with more, a band would be narrower than a few pixels."""
FAR = 10
"""The axis is logarithmic if values exceed so many times the representable range."""
CASES = 16
"""Most bad cases drawn."""
LINES = 4
"""An array with a side of at most this length is a list of points, not an image."""
HISTOGRAM_MARGINS = {"left": 0.07, "right": 0.985, "top": 0.84, "bottom": 0.11, "hspace": 0.06}
"""They fit every text around a histogram; to have matplotlib find them takes as long as to draw it."""
Floats = NDArray[np.float64]

DPI = 130
DARK = 0.3  # an image whose brightest value is below this (1 is white) is brightened


def save(figure: Figure, path: Path) -> Figure:
    """Write the PNG, without pyplot, which would keep every figure in memory and need a display.

    The figure is drawn once: `savefig` would draw a figure that is laid out a second time, to the same pixels.
    """
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    imsave(path, np.asarray(canvas.buffer_rgba()), dpi=DPI)  # type: ignore[no-untyped-call]
    return figure


def nothing(figure: Figure, axes: Axes, text: str) -> Figure:
    """One sentence in place of a chart."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=12, transform=axes.transAxes)
    return figure


def layer_histogram(
    counts: ArrayLike,
    edges: ArrayLike,
    scale: float,
    dtype_name: str,
    qmin: int,
    qmax: int,
    title: str,
    path: Path,
    *,
    absolute: bool = False,
) -> Figure:
    """Float values of a layer (log counts) above its quantization grid, the clipped share shaded on both sides.

    Values beyond the threshold that calibration chose, -`qmin` x scale, are clipped, as everywhere in the analysis (a
    value between the last code and that threshold loses at most a step); a bin across it counts in proportion. With
    `absolute` the values are |x|, as calibration keeps them, and one side represents both.
    """
    bins, ends = np.asarray(counts, dtype=np.float64), np.asarray(edges, dtype=np.float64)
    figure = Figure(figsize=(10, 5.5))
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[9, 1], gridspec_kw=HISTOGRAM_MARGINS)
    figure.suptitle(title, fontsize=12, parse_math=False)
    if bins.sum() <= 0:
        strip.set_axis_off()
        return save(nothing(figure, axes, "There are no values."), path)
    # The outline keeps bins visible that are narrower than a pixel.
    axes.stairs(bins, ends, fill=True, fc=GREY, ec=GREY, lw=0.7)
    axes.set(yscale="log", ylabel="values a bin", ylim=(min(0.5, bins[bins > 0].min() / 2), bins.max() * 2))
    strip.set(yticks=[], ylim=(0, 1), xlabel="|float value|" if absolute else "float value")
    if not (0.0 < scale < math.inf):
        strip.set_axis_off()
        axes.tick_params(labelbottom=True)
        axes.set_title(f"{dtype_name}: scale {scale:g}, so there is no grid", y=1.0, fontsize=10, color=RED)
        return save(figure, path)
    fewest = 0 if absolute else qmin
    _range(axes, bins, ends, (fewest * scale, qmax * scale), -qmin * scale, absolute)
    used, codes = _codes_used(bins, ends, scale, fewest, qmax), qmax - fewest + 1
    label = f"{dtype_name}, scale {scale:.4g}: 99 % of the values lie on {used} of {codes} codes"
    figure.suptitle(f"{title}\n{label}", fontsize=11, parse_math=False)
    _grid(strip, scale, fewest, qmax)
    return save(figure, path)


def _range(axes: Axes, bins: Floats, ends: Floats, reach: tuple[float, float], limit: float, absolute: bool) -> None:
    """Draw the representable range as lines; shade what lies beyond `limit` and print its share."""
    low, high = min(ends[:-1][bins > 0].min(), reach[0]), max(ends[1:][bins > 0].max(), reach[1])
    left, right = _scale_axis(axes, low, high, max(-reach[0], reach[1]))
    under, total = count_below(bins, ends, -limit), count_below(bins, ends, math.inf)
    over = total - count_below(bins, ends, limit)
    sides = [("above", "right", over / total, limit, right)]
    titles: dict[str, Any] = {"y": 1.0, "fontsize": 10}  # a given height: matplotlib searches for a free one for long
    sides += [] if absolute else [("below", "left", under / total, left, -limit)]
    for word, side, share, start, end in sides:
        if end > start:
            axes.axvspan(start, end, color=RED, alpha=0.22, lw=0, zorder=0, label=f"clipped {word}")
        color, weight = (RED, "bold") if share else ("black", "normal")
        axes.set_title(f"clipped {word}: {100 * share:.3g} %", loc=side, color=color, weight=weight, **titles)  # type: ignore[arg-type]
    for edge in reach[absolute:]:
        axes.axvline(edge, color=GREEN, lw=1.6, ls="--", label="representable range")
    axes.set_title(f"representable: {reach[0]:.4g} to {reach[1]:.4g}", color=GREEN, weight="bold", **titles)


def _scale_axis(axes: Axes, low: float, high: float, reach: float) -> tuple[float, float]:
    """Set the horizontal axis; logarithmic beyond the range if a few far values (masks) would hide the rest."""
    if max(-low, high) > FAR * reach:
        axes.set_xscale("symlog", linthresh=reach, linscale=2.0)
        left, right = (
            1.2 * end if abs(end) > reach else end + sign * 0.1 * reach for sign, end in ((-1, low), (1, high))
        )
    else:
        left, right = low - 0.03 * (high - low), high + 0.03 * (high - low)
    axes.set_xlim(left, right)
    return left, right


def count_below(bins: Floats, ends: Floats, value: float) -> float:
    """Number of values below `value`; the bin that contains it counts in proportion."""
    return float(np.interp(value, ends, np.concatenate([[0.0], np.cumsum(bins)])))


def _codes_used(bins: Floats, ends: Floats, scale: float, qmin: int, qmax: int) -> int:
    """Number of codes that the middle 99 % of the values span (of |x|: the lower 99 %)."""
    share = np.concatenate([[0.0], np.cumsum(bins)]) / bins.sum()
    tails = (0.0, 0.99) if qmin == 0 else (0.005, 0.995)
    low, high = (int(np.clip(round(np.interp(t, share, ends) / scale), qmin, qmax)) for t in tails)
    return high - low + 1


def _grid(strip: Axes, scale: float, qmin: int, qmax: int) -> None:
    """Draw the grid in bands of one code each, or of as many as are needed to keep a band visible."""
    left, right = strip.get_xlim()
    first, last = max(qmin, math.floor(left / scale)), min(qmax, math.ceil(right / scale))
    group = 1
    while (last - first + 1) / group > BANDS:
        group *= 2
    starts = range(first - first % group, last + 1, 2 * group)
    bands = [((max(s, qmin) - 0.5) * scale, (min(s + group, qmax + 1) - max(s, qmin)) * scale) for s in starts]
    strip.axvspan((qmin - 0.5) * scale, (qmax + 0.5) * scale, color=BLUE, alpha=0.25, lw=0)
    strip.broken_barh(bands, (0, 1), color=BLUE, lw=0)
    each = "one code" if group == 1 else f"{group} codes"
    strip.set_ylabel("grid", rotation=0, ha="right", va="center")
    beyond = ", the axis is logarithmic beyond the range" if strip.get_xscale() != "linear" else ""
    strip.set_xlabel(f"{strip.get_xlabel()}      (a band of the grid is {each}{beyond})")


def badcase_grid(images: Sequence[ArrayLike], captions: Sequence[str], path: Path) -> Figure:
    """Bad cases side by side: [H, W], [H, W, 3] or [C, H, W] as images, vectors and point lists as lines.

    More than three channels are shown as their mean. The caption notes this, and a range of values that had to be
    rescaled. At most 16 cases are shown; the title gives the number of the others.
    """
    if len(images) != len(captions):
        raise ValueError(f"badcase_grid takes one caption an image, but got {len(images)} and {len(captions)}.")
    shown = min(len(images), CASES)
    columns = min(max(shown, 1), 4)
    rows = max(math.ceil(shown / columns), 1)
    aspects = [_aspect(np.asarray(image)) for image in images[:shown]]
    heights = [3.1 * max(aspects[i : i + columns]) + 0.75 for i in range(0, shown, columns)] or [2.0]
    figure = Figure(figsize=(3.2 * max(columns, 2), sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
    more = f" ({len(images) - shown} more are not shown)" if len(images) > shown else ""
    figure.suptitle(f"Bad cases: {shown}{more}", fontsize=12)
    if not shown:
        return save(nothing(figure, grid[0], "No bad cases."), path)
    for axes, image, caption in zip(grid, images, captions, strict=False):
        notes = _draw_case(axes, np.asarray(image))
        axes.set_title("\n".join([*_wrap(caption), *notes]), fontsize=8, parse_math=False)
    for axes in grid[shown:]:
        axes.set_axis_off()
    return save(figure, path)


def _wrap(caption: str, width: int = 44) -> list[str]:
    return [line for part in caption.splitlines() for line in textwrap.wrap(part, width)] or [""]


def _draw_case(axes: Axes, array: NDArray[Any]) -> list[str]:
    """Draw one case; returns notes on it for the caption."""
    notes = []
    while array.ndim > 3 and array.size:
        notes += [f"first of {len(array)}"] if len(array) > 1 else []
        array = array[0]
    axes.set(xticks=[], yticks=[])
    if array.size == 0 or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        nothing(axes.figure, axes, "nothing to draw")  # type: ignore[arg-type]
        return [f"shape {array.shape}, {array.dtype}"]
    broken = int((~np.isfinite(array)).sum())
    notes += [f"{broken} values are not finite"] if broken else []
    if array.ndim < 2 or _is_points(array):
        return notes + _draw_lines(axes, array)
    picture, changes = as_picture(array)
    axes.imshow(picture, cmap="gray" if picture.ndim == 2 else None, vmin=0.0, vmax=1.0)
    return notes + changes


def _aspect(array: NDArray[Any]) -> float:
    """Height over width of a case when it is drawn."""
    if array.ndim < 2 or min(array.shape[-2:]) == 0 or _is_points(array):
        return 0.6
    height, width = array.shape[:2] if array.ndim == 3 and array.shape[2] == 3 else array.shape[-2:]
    return float(np.clip(height / width, 0.3, 1.5))


def _is_points(array: NDArray[Any]) -> bool:
    return array.ndim == 2 and min(array.shape) <= LINES


def _draw_lines(axes: Axes, array: NDArray[Any]) -> list[str]:
    """Draw a vector as one line, a list of points as one line per coordinate."""
    lines = np.atleast_2d(array.astype(np.float64))
    lines = lines if len(lines) <= lines.shape[1] else lines.T
    for line, style, color in zip(lines, ("-", "--", ":", "-."), (BLUE, RED, GREEN, GREY), strict=False):
        axes.plot(line, style, color=color, lw=1.2, marker="." if lines.shape[1] <= 32 else "")
    axes.set_box_aspect(0.6)
    count = lines.shape[1]
    finite = lines[np.isfinite(lines)]
    reach = f", {finite.min():.3g} to {finite.max():.3g}" if finite.size else ""
    return [f"{count} points of {len(lines)} coordinates{reach}" if len(lines) > 1 else f"{count} numbers{reach}"]


def as_picture(array: NDArray[Any]) -> tuple[Floats, list[str]]:
    """[H, W] or [H, W, 3] in 0 .. 1, and notes on the conversion. 0 .. 1 and bytes of 0 .. 255 keep their range."""
    notes: list[str] = []
    values = array.astype(np.float64) / (255.0 if array.dtype == np.uint8 else 1.0)
    if values.ndim == 3 and values.shape[2] != 3:
        values = np.moveaxis(values, 0, 2)
    if values.ndim == 3 and values.shape[2] != 3:
        notes += [f"mean of {values.shape[2]} channels"] if values.shape[2] > 1 else []
        values = values.mean(axis=2)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if low < 0.0 or high > 1.0:
        notes.append(f"values {low:.3g} to {high:.3g}")
        values = (values - low) / ((high - low) or 1.0)
    elif 0.0 < high < DARK:  # darkness is often the reason for a bad case: it is noted, and the image made visible
        notes.append(f"dark: up to {high:.2g}, shown {1.0 / high:.0f} times as bright")
        values = values / high
    return np.clip(np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0), 0.0, 1.0), notes
