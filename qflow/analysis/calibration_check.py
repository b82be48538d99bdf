"""What calibration shows beyond the structure: ranges, shared modules, overflow, channels that do nothing.

The guide's model check looks at names and dtypes. With statistics at hand it can say more:

    shared module    case B (its calls see similar values: harmless) or case C (one scale for unlike calls: copy it),
                     by the ratio of the calls' 99.9 % thresholds, C above 2
    range            int8 with |x| up to more than 10 (the manual's rule of thumb)
    infinities       masks of -inf: they saturate at the smallest code
    accumulator      sum |w_q| x largest input code of an output channel beyond int32, or its bias
    dead channels    all weights of an output channel are zero
"""

from __future__ import annotations

import torch
from torch import Tensor

from qflow.analysis.tables import Finding
from qflow.core.device import input_dtypes
from qflow.core.dtype import QDtype
from qflow.core.graph import OpNode
from qflow.core.qconfig import QConfig
from qflow.quant.calibrate import CalibrationStats
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.weighted import WeightedLeaf

UNLIKE_CALLS = 2.0
INT8_RANGE = 10.0
INT32 = 2**31 - 1


def calibration_findings(
    prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig, extra: list[str]
) -> tuple[Finding, ...]:
    """Findings on a calibrated model; `extra` are those of `apply_scales`."""
    found = [
        Finding(text.split(" ")[0], "error" if "not reached" in text else "check", text.partition(" ")[2])
        for text in extra
    ]
    for node in prepared.graph.quantized:
        found += _range(node, stats, qconfig)
    found += _shared(stats)
    found += _weights(prepared, qconfig)
    return tuple(found)


def _range(node: OpNode, stats: CalibrationStats, qconfig: QConfig) -> list[Finding]:
    histogram = stats.histograms.get(node.quantizer or "")
    if histogram is None:
        return []
    found = []
    if histogram.infinite:
        text = f"{histogram.infinite} infinite values (a mask?) saturate at the smallest code: use a finite mask value"
        found.append(Finding(node.name, "check", text))
    pinned = qconfig.ops[node.name].pinned_scale()
    output = qconfig.ops[node.name].output
    if output == QDtype.qint8 and histogram.largest > INT8_RANGE and pinned is None:
        text = f"|x| up to {histogram.largest:.4g} in qint8: above {INT8_RANGE:g} int8 is not advised, try qint16"
        found.append(Finding(node.name, "check", text))
    if pinned is not None and output is not None and pinned * -output.qmin < 0.5 * histogram.largest:
        text = f"fixed scale covers {pinned * -output.qmin:.4g}, but values reach {histogram.largest:.4g}"
        found.append(Finding(node.name, "check", text))
    return found


def _shared(stats: CalibrationStats) -> list[Finding]:
    found = []
    for quantizer, calls in stats.calls.items():
        reach = {name: h.percentile(99.9) if h.largest else 0.0 for name, h in calls.items()}
        low, high = min(reach, key=lambda n: reach[n]), max(reach, key=lambda n: reach[n])
        if reach[high] > UNLIKE_CALLS * reach[low]:
            text = (
                f"shared module, case C: {high} reaches {reach[high]:.4g} and {low} {reach[low]:.4g} under one scale: "
                "give each call a module of its own"
            )
            found.append(Finding(quantizer, "check", text))
        else:
            found.append(Finding(quantizer, "info", f"shared module, case B: its {len(calls)} calls see like values"))
    return found


def _weights(prepared: QuantizedModel, qconfig: QConfig) -> list[Finding]:
    found = []
    modules = dict(prepared.model.named_modules())
    for node in prepared.graph.weighted:
        leaf = modules.get(node.weight or "")
        if not isinstance(leaf, WeightedLeaf):
            continue
        quantizer = prepared.weights[node.weight or ""]
        with torch.no_grad():
            weight, bias = leaf.folded()
            others = [d for d in range(weight.ndim) if d != quantizer.axis]
            dead = int((weight.abs().amax(dim=others) == 0).sum())
            if dead:
                text = f"{dead} of {weight.shape[quantizer.axis]} output channels have no weight other than zero"
                found.append(Finding(node.name, "info", text))
            found += _overflow(prepared, node, qconfig, weight, bias, others)
    return found


def _overflow(
    prepared: QuantizedModel, node: OpNode, qconfig: QConfig, weight: Tensor, bias: Tensor | None, others: list[int]
) -> list[Finding]:
    """Output channels whose sum of products, or bias at scale s_in s_w, leaves int32."""
    quantizer = prepared.weights[node.weight or ""]
    dtypes = [d for d in input_dtypes(prepared.graph, qconfig, node.name)[:1] if d.is_integer]
    sources = prepared.graph.source(node.inputs[0]) if node.inputs else ()
    if quantizer.dtype is None or not quantizer.dtype.is_integer or not dtypes or not sources:
        return []
    codes = (weight / quantizer.scale).round().abs().sum(dim=others).double()
    found = []
    reach = codes * -dtypes[0].qmin
    if dtypes[0] == QDtype.qint8 and bool((reach > INT32).any()):
        text = f"{int((reach > INT32).sum())} channels can leave the int32 accumulator"
        found.append(Finding(node.name, "error", text))
    scale = float(prepared.outputs[prepared.graph.by_name[sources[0]].quantizer or ""].scale)
    if bias is not None and scale > 0.0 and bias.numel() == quantizer.scale.numel():
        steps = (bias.double() / (scale * quantizer.scale.flatten().double())).abs()
        if bool((steps > INT32).any()):
            text = f"the bias of {int((steps > INT32).sum())} channels leaves int32 at scale s_in x s_w"
            found.append(Finding(node.name, "error", text))
    return found
