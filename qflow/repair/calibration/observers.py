"""The calibration method of each activation quantizer by the error of the outputs.

A calibration method chooses a threshold by the values of one quantizer: mse by their squared error, percentile by their
number. Neither knows what an error there does to the outputs: values that clipping takes away may be those that decide,
or noise. Here the methods' thresholds, which all follow from the one pass of the calibration, are compared by the error
of the outputs that they cause (output_error.py), each quantizer alone, at the quantized model. What is stored is the
method, not the threshold: it holds for other calibration data too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.graph import OpNode
from qflow.core.qconfig import OpQConfig
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import cut
from qflow.repair.base.contract import Context, Part, Step
from qflow.repair.base.operators import Skipped
from qflow.repair.calibration.output_error import DIRECTIONS, output_errors

METHODS = ("minmax", "percentile", "mse", "kl", "mix")
"""The methods without parameters that belong to one range of values (clip, clip_std)."""
MARGIN = "largest value with a margin"
"""The name of what int16 takes without a method of its own."""
ALIKE = 0.01
"""Thresholds that differ by less than this share are one."""
SAMPLES = 192
"""Samples whose gradients are taken."""
BEYOND = 1.5
"""A method is chosen if its squared error is lower by this many standard errors of the paired difference."""
LEAST = 0.002
"""It also has to lower the squared error by this share of that of all quantizers together."""


@dataclass(frozen=True)
class Choice:
    """Another method for one operator."""

    method: str
    changed: str


class Observers(Step):
    """Choose the calibration method of each operator anew; a part for each operator that gets another one.

    The float function stays as it is, but the methods fit few samples: so the step does not ask for the milder verdict
    of a step that is `preserving`.
    """

    name = "observers"

    def parts(self, prepared: QuantizedModel, context: Context) -> tuple[Sequence[Part], Skipped]:
        tried, skipped = _methods(prepared, context)
        scales = {name: [scale for _, scale in found] for name, (_, found) in tried.items()}
        batches = _first(context.batches, SAMPLES)
        errors = output_errors(prepared, batches, scales)
        context.forwards += (1 + DIRECTIONS) * sum(size for _, size in batches)  # a gradient costs about a forward
        finite = {name: found for name, found in errors.items() if bool(found.isfinite().all())}
        least = LEAST * sum(float(found[0].mean()) for found in finite.values())
        parts = []
        for name, (node, found) in tried.items():
            if name not in finite:
                why = "no gradient of an output reaches it" if name not in errors else "its gradient is not finite"
                skipped[node.name] = why
                continue
            chosen = best(finite[name], least)
            if chosen == 0:
                skipped[node.name] = "no method has a smaller error of the outputs"
                continue
            divisor = prepared.outputs[name].divisor()
            (old, before), (new, after) = found[0], found[chosen]
            text = f"{old} -> {new}, threshold {before * divisor:.3g} -> {after * divisor:.3g}"
            parts.append(Part(node.name, Choice(new, text)))
        return parts, skipped

    def apply(self, prepared: QuantizedModel, context: Context, parts: Sequence[Part]) -> Mapping[str, str]:
        ops = context.qconfig.ops
        context.qconfig = context.qconfig.with_ops({p.name: observed(ops[p.name], p.data.method) for p in parts})
        return {part.name: part.data.changed for part in parts}


def observed(op: OpQConfig, method: str) -> OpQConfig:
    """`op` with another calibration method; at int16 as its own, because int16 leaves a template's method aside."""
    own = op.output == QDtype.qint16
    return replace(op, observer=method, own_observer=own, rule=f"{op.rule}; repair: observer {method}")


Methods = list[tuple[str, float]]
"""Methods and their scales, the present one first."""


def _methods(prepared: QuantizedModel, context: Context) -> tuple[dict[str, tuple[OpNode, Methods]], Skipped]:
    """The quantizers whose methods give several scales, and why others keep their method."""
    assert context.stats is not None
    tried: dict[str, tuple[OpNode, Methods]] = {}
    skipped: Skipped = {}
    for node in prepared.graph.quantized:
        op, quantizer = context.qconfig.ops[node.name], prepared.outputs[str(node.quantizer)]
        histogram = context.stats.histograms.get(quantizer.name)
        if quantizer.dtype is None or not quantizer.dtype.is_integer or histogram is None:
            continue
        if held := held_by_user(op):
            skipped[node.name] = held
            continue
        wide = quantizer.dtype == QDtype.qint16
        present = MARGIN if wide else op.observer or context.settings.method
        found = [(present, float(quantizer.scale))]
        for method in METHODS:
            if wide and method == "kl":
                continue
            scale = histogram.scale(quantizer.dtype, context.settings, method)
            if scale > 0 and all(not math.isclose(scale, other, rel_tol=ALIKE) for _, other in found):
                found.append((method, scale))
        if len(found) > 1:
            tried[quantizer.name] = node, found
        else:
            skipped[node.name] = "all methods give the same threshold"
    return tried, skipped


def held_by_user(op: OpQConfig) -> str:
    """Why the user's setting for this operator stands; empty if it has none."""
    if op.fixed_scale is not None:
        return "its scale is fixed"
    if op.known_range is not None:
        return "its scale follows from its known range"
    if op.frozen:
        return "its scale is frozen"
    return "its observer was set by name" if op.own_observer else ""


def best(errors: Tensor, least: float) -> int:
    """The scale of least mean error, [scales, estimates]; the first one unless another is better by the two limits."""
    change = errors - errors[0]
    gain, noise = -change.mean(1), change.std(1) / math.sqrt(errors.shape[1])
    gain = torch.where((gain > BEYOND * noise) & (gain > least), gain, torch.zeros_like(gain))
    return int(gain.argmax())


def _first(batches: Sequence[tuple[Any, int]], most: int) -> list[tuple[Any, int]]:
    """About `most` samples, an equal share of each batch."""
    total = sum(size for _, size in batches)
    share = min(1.0, most / total)
    kept = [(inputs, size, max(1, round(size * share))) for inputs, size in batches]
    return [(cut(inputs, size, 0, count) if count < size else inputs, count) for inputs, size, count in kept]
