"""The causes of a sensitive activation, and what removes each.

The cause is the first of these that applies. (Truncation stands twice: where another scale mends it, that comes before
all that int16 would be advised for.)

    huge mask value   a finite mask of a softmax leaves the scores hardly any codes (checks/mask_check.py)
    far values        a few values far beyond all others leave those hardly any codes (checks/scale_check.py); where a
                      scale cuts them off, this is no truncation
    known range       the range follows from the operator (sigmoid, softmax, clamp), and the scale covers more than
                      twice as much, or cuts values off although it covers at least about half of it
    truncation        a fixed scale that holds the float range of all calls has at most a quarter of the squared error
    constant          a parameter, a buffer or the table of an embedding, whose resolution is too low
    shared module     one scale serves calls whose 99.9 % thresholds of |x| differ by a factor of more than 2
    calibration data  on the bad cases |x| exceeds 1.5 times the largest value during calibration
    truncation        the squared error beyond the range is larger than that of rounding, scale^2 / 12
    rounding          otherwise: the resolution is too low

Source of the order: the guide first compares min and max with the scale's range (a matter of the scale), and only then
asks for resolution (a matter of the dtype).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from qflow.analysis.checks.mask_check import FEW, WAY_OUT, FiniteMask, mask_text
from qflow.analysis.checks.shared_check import UNLIKE_CALLS, call_reach
from qflow.analysis.measures.tables import LayerRow
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.known_range import bounded
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.values.observer import Histogram

FAR_VALUES = "far values"
FAR = 1.5  # bad cases are far beyond the calibration data above this times their largest value
CUT = 1.05  # values are cut off if they exceed the range by more than this
MENDED = 0.25  # another scale mends a truncation if it leaves at most this part of the squared error


@dataclass(frozen=True)
class Case:
    """What is known about one sensitive quantizer."""

    node: OpNode
    score: float
    histogram: Histogram | None
    layers: tuple[LayerRow, ...]
    """Its rows of the layer comparison, one for each call; empty if layers were not compared."""
    scale: float
    dtype: QDtype

    @property
    def reach(self) -> float:
        """Largest |x| that the scale can represent."""
        return self.scale * -self.dtype.qmin

    @property
    def rounding(self) -> float:
        """Mean squared rounding error, scale^2 / 12."""
        return self.scale**2 / 12.0

    @property
    def largest(self) -> float:
        """Largest |x| of the float model on the bad cases; during calibration if layers were not compared."""
        ends = [v for row in self.layers for v in (row.base_model_min, row.base_model_max)]
        found = [abs(v) for v in ends if v is not None and math.isfinite(v)]
        return max(found) if found else (self.histogram.largest if self.histogram else 0.0)

    def clipped(self) -> tuple[float, float]:
        """(share of the calibration values beyond the range, mean squared error that cutting them off makes)."""
        return self.histogram.beyond(self.reach) if self.histogram else (0.0, 0.0)

    def clip_error(self) -> float:
        """Mean squared error beyond the range: that of the calibration values, or the larger one on the bad cases.

        The operator's own error on the bad cases, |base - single| / |base|, counts where these exceed the range; what
        rounding explains is left out. Far values do not count.
        """
        if self.histogram is not None and self.histogram.near < self.histogram.largest:
            return self.histogram.beyond(self.reach, self.histogram.near)[1]
        measured = 0.0
        for row in self.layers if self.largest > CUT * self.reach else ():
            if row.single_error is not None and row.base_model_mean is not None and row.base_model_var is not None:
                square = row.base_model_mean**2 + row.base_model_var
                measured = max(measured, row.single_error**2 * square - self.rounding)
        return max(self.clipped()[1], measured if math.isfinite(measured) else 0.0)

    def values(self) -> dict[str, float]:
        """Name -> value of all that an advice is based on."""
        found = {"score": self.score, "scale": self.scale, "range": self.reach, "float max": self.largest}
        found |= {"clipped share": self.clipped()[0], "clip error": self.clip_error(), "rounding error": self.rounding}
        if self.layers:
            worst = max(self.layers, key=lambda row: row.single_error or 0.0)
            for name, value in (("own error", worst.single_error), ("accumulated error", worst.error)):
                if value is not None:
                    found[name] = value
        return found


@dataclass(frozen=True)
class Cause:
    """Why an activation is sensitive, what that means as text, and the `spec` that removes it ("" if none does)."""

    name: str
    text: str
    spec: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    raised: str = ""
    """What the text adds where int16 helps: the device keeps it, and the operator does not have it already."""


def cause_of(case: Case, graph: ModelGraph, stats: CalibrationStats, mask: FiniteMask | None, near: str = "") -> Cause:
    """Return the first cause that applies (see the module's docstring).

    `mask` is one that the values hold; `near` is a setting that cuts far values off.
    """
    h = case.histogram
    if mask is not None and mask.codes < FEW:
        return Cause("huge mask value", f"{mask_text(mask)}: {WAY_OUT}")
    if near and h is not None:
        text = "a few values lie far beyond all others: take them out of the data, or let this scale cut them off"
        return Cause(FAR_VALUES, text, near, {"largest but far": h.near})
    if found := _known_range(case, graph) or _mended(case):
        return found
    if case.node.kind == OpKind.constant:
        text = "the resolution is too low for this constant of the model: scale it down in the model"
        return Cause("constant", text, "qint16", raised=", or raise it to int16")
    reach = call_reach(stats, case.node.quantizer or "")
    low, high = min(reach.values(), default=0.0), max(reach.values(), default=0.0)
    if reach and high > UNLIKE_CALLS * low:
        text = "its calls need different scales: give each call a module of its own (quant.split_shared tries it)"
        return Cause("shared module", text, "qint16", {"call min": low, "call max": high}, ", or raise it to int16")
    if h is not None and case.largest > FAR * h.largest:
        scale = case.largest / -case.dtype.qmin
        text = "the bad cases go far beyond the calibration data: add such samples to it "
        text += f"(a scale of {scale:.3g} holds them)"
        return Cause("calibration data", text, "", {"calibration max": h.largest})
    if case.clip_error() > case.rounding:
        text = f"{_cut_off(case)}, and {case.dtype} cannot both cover and resolve them"
        return Cause("truncation", text, "qint16", raised=": raise it to int16")
    text = "the resolution is too low for what follows"
    if 0 < case.largest < case.reach / 4.0:
        codes = max(1, round(case.largest / case.scale))
        text += f": the bad cases reach {case.largest:.3g} of {case.reach:.3g}, {codes} of {-case.dtype.qmin} codes"
    return Cause("rounding", text, "qint16")


def _known_range(case: Case, graph: ModelGraph) -> Cause | None:
    bounds = bounded(graph).get(case.node.name)
    most = max(map(abs, bounds)) if bounds is not None else math.inf
    wasted, cut = case.reach > 2.0 * most, most >= case.largest > CUT * case.reach > 0.5 * most
    if bounds is None or not math.isfinite(most) or most <= 0.0 or not (wasted or cut):
        return None
    text = f"its range is {bounds[0]:g}..{bounds[1]:g} whatever the data: fix the scale"
    return Cause("known range", text, f"{case.dtype}@{bounds[0]:g}..{bounds[1]:g}", {"known max": most})


def _mended(case: Case) -> Cause | None:
    """Truncation that a scale mends at the present dtype; None if there is none, or if the error would hardly fall."""
    h = case.histogram
    if h is None or case.largest > FAR * h.largest:  # other calibration data show how far the values go
        return None
    error, scale = case.clip_error(), max(h.largest, case.largest) / -case.dtype.qmin
    if not error > case.rounding or scale**2 / 12.0 > MENDED * (error + case.rounding):
        return None
    text = f"{_cut_off(case)}: {case.dtype} with a scale of {scale:.3g} holds the float range"
    return Cause("truncation", text, f"{case.dtype}@{scale:.3g}")


def _cut_off(case: Case) -> str:
    share, _ = case.clipped()
    if share > 0.0:
        return f"{share:.3%} of the values are cut off"
    return f"the bad cases reach {case.largest:.3g}, but the scale covers {case.reach:.3g}"
