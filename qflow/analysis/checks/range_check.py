"""Findings on the range of each operator: int8 and fp16 limits, infinities, fixed scales, and ranges known in advance.

    int8            |x| up to more than 10 (the guide's rule of thumb), on the calibration data or by a known range.
                    Operators that the device keeps at int8 are left out, because nobody can raise them
    fp16            |x| beyond 65504
    infinities      -inf that masks no softmax (quant/trace/masks.py): it saturates at the smallest code
    fixed scale     it covers less than half of what the values reach, or leaves them fewer than 8 codes of int8
    bounded         the function bounds the values (sigmoid 0..1, ReLU6 0..6), and they reach 0.9 of the bound, so that
                    a fixed scale fits. Values far below it (a softmax over many tokens) would lie on a few codes

Where sensitivities are known, only operators above the noise are worth a look; the others become information.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import cache

from qflow.analysis.checks.harmless import judged, noise_level
from qflow.analysis.checks.mask_check import WAY_OUT, FiniteMask, finite_masks, mask_findings
from qflow.analysis.measures.tables import Finding
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.graph import OpNode
from qflow.core.known_range import bounded
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.raisable import raisable
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.values.observer import Histogram

INT8_RANGE = 10.0
HALF_RANGE = 65504.0
FILLED = 0.9  # values fill a bound if they reach this part of it; a fixed scale is at most 1 / 0.9 times as coarse then
FEW_CODES = 8
LISTED = 4
SMALLER = "make the values smaller in the float model"


def range_findings(
    prepared: QuantizedModel,
    stats: CalibrationStats,
    qconfig: QConfig,
    rules: DeviceRules | None,
    scores: Mapping[str, float],
) -> list[Finding]:
    """Return the findings on ranges; `scores` are activation sensitivities, empty if they are unknown.

    Without `rules`, every operator counts as one that can be raised.
    """
    found: list[Finding] = []
    masks = finite_masks(prepared, stats)

    @cache  # two passes of the device rules: only for a finding that advises int16
    def raised() -> Collection[str]:
        names = tuple(node.name for node in prepared.graph.quantized)
        return names if rules is None else raisable(prepared.graph, rules, names)

    wide: dict[str, float] = {}
    for node in prepared.graph.quantized:
        histogram, op = stats.histograms.get(node.quantizer or ""), qconfig.ops[node.name]
        if histogram is not None:
            masking = node.quantizer in prepared.plan.masks
            found += _limits(node, histogram, op, masking, masks.get(node.name), raised, scores)
            reach = max(map(abs, op.known_range)) if op.known_range is not None else histogram.near
            if op.output == QDtype.qint8 and op.fixed_scale is None and node.name not in masks and reach > INT8_RANGE:
                wide[node.name] = reach
    found += mask_findings(masks)
    found += _beyond_int8({name: wide[name] for name in wide if name in raised()}, scores)
    return found + _bounded(prepared, stats, qconfig)


def _limits(
    node: OpNode,
    histogram: Histogram,
    op: OpQConfig,
    masks: bool,
    finite: FiniteMask | None,
    raised: Callable[[], Collection[str]],
    scores: Mapping[str, float],
) -> list[Finding]:
    """Findings on what one operator's dtype and fixed scale can represent.

    `masks`: the node's result only reaches a softmax, so that -inf in it is a mask and is kept. `finite`: a finite mask
    that its values hold. `raised` gives the operators that keep int16 on the device.
    """
    found = []
    if histogram.infinite and not masks:
        text = (
            f"{histogram.infinite} infinite values saturate at the end of the codes: a mask is masked_fill(mask, "
            "float('-inf')) right before a softmax, elsewhere take a finite value near the others"
        )
        found.append(Finding(node.name, "check", text))
    if op.output == QDtype.float16 and histogram.largest > HALF_RANGE:
        way = WAY_OUT if finite is not None else "try qint16" if node.name in raised() else SMALLER
        text = f"|x| up to {histogram.largest:.4g} in float16, which ends at {HALF_RANGE:g}: {way}"
        found.append(Finding(node.name, "check", text))
    pinned = op.pinned_scale()
    if pinned is not None and op.output is not None and finite is None:
        covers = pinned * -op.output.qmin
        near = histogram.near  # a fixed scale may cut far values off (scale_check.py)
        told = f"fixed scale covers {covers:.4g}, but values reach {near:.4g}"
        if covers < 0.5 * near:
            found.append(judged(node.name, told, scores))
        if op.output == QDtype.qint8 and 0.0 < near < FEW_CODES * pinned:
            way = "leave its scale to calibration" + (", or take qint16" if node.name in raised() else "")
            found.append(judged(node.name, f"{told}, {near / pinned:.1f} of 128 codes: {way}", scores))
    return found


def _beyond_int8(wide: Mapping[str, float], scores: Mapping[str, float]) -> list[Finding]:
    """One finding for all int8 operators beyond the rule of thumb; information if none of them is sensitive."""
    if not all(name in scores for name in wide):  # only some rows were measured
        scores = {}
    noise = noise_level(scores.values())
    sensitive = sorted((n for n in wide if scores.get(n, 0.0) > noise), key=lambda n: -scores[n])
    level = "info" if scores and not sensitive else "check"
    if len(wide) == 1:
        ((name, reach),) = wide.items()
        text = f"|x| up to {reach:.4g} in qint8: above {INT8_RANGE:g} int8 is not advised"
        return [Finding(name, level, text + (", but it is not sensitive" if level == "info" else ", try qint16"))]
    if not wide:
        return []
    largest = sorted(wide, key=lambda name: -wide[name])
    names = ", ".join(f"{name} ({wide[name]:.4g})" for name in largest[:LISTED]) + ", ..." * (len(wide) > LISTED)
    text = f"above {INT8_RANGE:g} in int8: {len(wide)} operators"
    if sensitive:
        more = ", ..." * (len(sensitive) > LISTED)
        text += f", of these sensitive: {', '.join(sensitive[:LISTED])}{more}; try qint16 for these"
    else:
        text += f", {names}" + ("; none is sensitive" if scores else "; try qint16 for those that are sensitive")
    return [Finding("model", level, text)]


def _bounded(prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig) -> list[Finding]:
    """int8 operators without a fixed scale whose function bounds their result, and whose values fill the bound."""
    found = []
    bounds, owners = bounded(prepared.graph), {node.name: node for node in prepared.graph.quantized}
    for name, (low, high) in bounds.items():
        histogram = stats.histograms.get(owners[name].quantizer or "") if name in owners else None
        op = qconfig.ops.get(name)
        most = max(abs(low), abs(high))
        if op is None or histogram is None or op.output != QDtype.qint8 or op.pinned_scale() is not None:
            continue
        if most > 0.0 and FILLED * most <= histogram.largest <= most * 1.001:
            text = f"its function bounds it to {low:g}..{high:g}, and its values fill that: "
            found.append(Finding(name, "info", f"{text}a fixed scale would fit exactly, qint8@{low:g}..{high:g}"))
    return found
