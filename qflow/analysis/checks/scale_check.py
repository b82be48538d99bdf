"""Findings on scales that resolve the values badly.

far values   A value is far if it exceeds 32 times all but 0.01 % of the values that are not 0
(quant/values/observer.py): a sentinel, a defective reading, and what follows from them. If the scale
covers such values and leaves the others fewer than 32 codes, a scale for the others is named, for
every operator that the far values reach.
floor        No scale is below float32 epsilon, as in the plugin. Values that would need a smaller one use only
part of the codes; int16 may then be no finer than int8. So does the variance inside a norm of small values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qflow.analysis.checks.harmless import judged
from qflow.analysis.measures.override import override
from qflow.analysis.measures.tables import Finding
from qflow.core.dtype import QDtype
from qflow.core.graph import OpKind, OpNode
from qflow.core.known_range import bounded
from qflow.core.qconfig import QConfig
from qflow.quant.model.calibrate import CalibrationStats, folded_weights
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.values.fake_quant import EPS, FakeQuant

FEW_CODES = 32
LARGER = "In the float model, make it that much larger and what reads it smaller"
SEEN, UNSEEN = 0.02, 0.002  # relative errors of 1 / sqrt(variance) that count, and that advice aims at
SOFTMAX = "In the float model, take exp(x - max) in its place and divide what reads it by the sum"


def scale_findings(
    prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig, scores: Mapping[str, float]
) -> list[Finding]:
    """Findings on the scales of a calibrated model; `scores` are activation sensitivities, empty if unknown."""
    return _far(prepared, stats, qconfig) + _floors(prepared, stats, scores)


def near_specs(prepared: QuantizedModel, stats: CalibrationStats) -> dict[str, str]:
    """Operator -> `qint8@0.0364`, a scale for all its values but the far ones, where its own leaves those few codes."""
    limits = bounded(prepared.graph)  # within the bounds of its function, a value is no defect
    found = {}
    for node in prepared.graph.quantized:
        histogram, quantizer = stats.histograms.get(node.quantizer or ""), prepared.outputs[node.quantizer or ""]
        dtype, scale = quantizer.dtype, float(quantizer.scale)
        if histogram is None or node.name in limits or dtype is None or not dtype.is_integer or not scale:
            continue
        near = histogram.near
        if near < histogram.largest and near / scale < FEW_CODES:
            found[node.name] = f"{dtype}@{near / -dtype.qmin:.4g}"
    return found


def _far(prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig) -> list[Finding]:
    """One finding for all operators that far values reach, at the first of them."""
    specs = {n: spec for n, spec in near_specs(prepared, stats).items() if qconfig.ops[n].pinned_scale() is None}
    if not specs:
        return []
    first = prepared.graph.by_name[next(iter(specs))]
    histogram, scale = stats.histograms[first.quantizer or ""], prepared.outputs[first.quantizer or ""].scale
    others = f" and of {len(specs) - 1} more operators" if len(specs) > 1 else ""
    text = (
        f"|x| up to {histogram.largest:.4g}, but all except at most 0.01 % of its values lie within "
        f"{histogram.near:.4g}, which is {histogram.near / float(scale):.2g} steps of the scale. If the far values are "
        f"defects, take them out of the calibration data, or fix the scales of this{others} so that they are cut off: "
        f"{override(specs) or specs}"
    )
    return [Finding(first.name, "check", text)]


def _floors(prepared: QuantizedModel, stats: CalibrationStats, scores: Mapping[str, float]) -> list[Finding]:
    """A finding for each operator whose values, and for each whose weight, is at the smallest scale."""
    found = []
    for node in prepared.graph.quantized:
        histogram = stats.histograms.get(node.quantizer or "")
        effect = _floor(prepared.outputs[node.quantizer or ""], histogram.near if histogram else 0.0)
        if effect:
            way_out = SOFTMAX if node.kind == OpKind.softmax else LARGER
            found.append(judged(node.name, f"|x| up to {effect}{way_out}", scores))
        found += _variance_floor(prepared, stats, node)
    weights = folded_weights(prepared, stats)
    for node in prepared.graph.weighted:
        quantizer, weight = prepared.weights[node.weight or ""], weights.get(node.weight or "")
        if weight is not None:
            effect = _floor(quantizer, float(weight.abs().masked_fill(quantizer.scale > EPS, 0.0).max()))
            if effect:
                found.append(Finding(node.name, "check", f"|weight| up to {effect}{LARGER}"))
    return found


def _variance_floor(prepared: QuantizedModel, stats: CalibrationStats, node: OpNode) -> list[Finding]:
    """A finding if the variance inside a norm is at the smallest scale, and its rounding is seen beside its eps.

    rsqrt(v + eps) is known from calibration, so the smallest v + eps is too. A norm gives the same for c x and c^2 eps.
    """
    own = {name.removeprefix(f"{node.name}."): name for name in node.inner}
    variance = own.get("var_mean.var") or own.get("mean")
    inverse, squares = (stats.histograms.get(name or "") for name in (own.get("rsqrt"), variance))
    if variance is None or inverse is None or squares is None or not inverse.near:
        return []
    quantizer, least = prepared.outputs[variance], inverse.near**-2.0
    at_floor = quantizer.dtype == QDtype.qint16 and quantizer.calibrated and float(quantizer.scale) <= EPS
    if not at_floor or min(EPS / 2.0, squares.near) / (2.0 * least) < SEEN:
        return []
    times = 2.0 ** math.ceil(math.log2(EPS / (4.0 * least * UNSEEN)) / 2.0)
    text = (
        f"a variance of {least:.3g} (with eps) is rounded to multiples of the device's floor, {EPS:.3g} (float32 "
        f"epsilon). In the float model, make what the norm reads {times:g} times larger and its eps {times**2:g} "
        "times: the result stays the same"
    )
    return [Finding(node.name, "check", text)]


def _floor(quantizer: FakeQuant, largest: float) -> str:
    """The effect, if the scale is the smallest one and the values therefore do not use all codes; else ""."""
    dtype = quantizer.dtype
    if dtype is None or not dtype.is_integer or not quantizer.calibrated or float(quantizer.scale.min()) > EPS:
        return ""
    codes, most = largest / EPS, -dtype.qmin
    if largest == 0.0 or codes >= most:
        return ""
    floor = f"the scale is at the device's floor, {EPS:.3g} (float32 epsilon), {most / codes:.3g} times too large"
    return f"{largest:.3g} gets {codes:.3g} of {most} steps: {floor}. "
