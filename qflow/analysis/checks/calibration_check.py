"""Findings from the statistics of a calibration: ranges, shared modules, overflow, dead channels.

The guide's model check looks at names and dtypes only. The statistics show more:

    shared module    whether its calls see similar values (shared_check.py)
    ranges           beyond int8 or fp16, infinities, fixed scales (range_check.py)
    scales           far values take the codes from all others, scales at the device's floor (scale_check.py)
    finite masks     a value far below all scores that reaches a softmax: it takes the range from the scores
                     (mask_check.py)
    accumulator      sum |w_q| x largest input code of an output channel exceeds int32, or its bias does
    dead channels    all weights of an output channel are zero
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qflow.analysis.checks.range_check import range_findings
from qflow.analysis.checks.scale_check import scale_findings
from qflow.analysis.checks.shared_check import case_findings
from qflow.analysis.measures.tables import Finding
from qflow.core.device import input_dtypes
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.graph import OpNode
from qflow.core.qconfig import QConfig
from qflow.quant.model.calibrate import CalibrationStats
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.weighted import WeightedLeaf

INT32 = 2**31 - 1
UNSEEN = (
    "on the calibration data but not while the model was traced (a branch on the data?): left in float. Skip the "
    "module that branches, or give an example that takes this path"
)


def calibration_findings(
    prepared: QuantizedModel,
    stats: CalibrationStats,
    qconfig: QConfig,
    extra: Sequence[str],
    rules: DeviceRules | None = None,
    scores: Mapping[str, float] | None = None,
) -> tuple[Finding, ...]:
    """Findings on a calibrated model; `extra` are those of `apply_scales`.

    `rules` of the device tell which operators can be raised, `scores` (activation sensitivities) which are worth it.
    """
    found = [
        Finding(text.split(" ")[0], "error" if "not reached" in text else "check", text.partition(" ")[2])
        for text in extra
    ]
    found += range_findings(prepared, stats, qconfig, rules, scores or {})
    found += scale_findings(prepared, stats, qconfig, scores or {})
    for name in stats.unseen:
        op, at, line = name.partition(" at ")  # a functional comes with the user's line
        found.append(Finding(op, "check", f"ran{at}{line} {UNSEEN}"))
    found += _precision()
    found += case_findings(prepared, stats, scores or {})
    found += _weights(prepared, qconfig)
    return tuple(found)


def _precision() -> list[Finding]:
    """Findings on settings of this process that compute float results in less than float32 precision."""
    found = []
    if any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
        text = "autocast is on: operators compute in half precision, unlike on the device. Run this outside autocast"
        found.append(Finding("model", "check", text))
    if torch.cuda.is_available() and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32):
        text = "TF32 is on: prepared models switch it off, the float model that they are compared with uses it"
        found.append(Finding("model", "info", text))
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
            axis = prepared.weight_shapes[quantizer.name][1]
            others = [d for d in range(weight.ndim) if d != axis]
            dead = int((weight.abs().amax(dim=others) == 0).sum())
            if dead:
                text = f"{dead} of {weight.shape[axis]} output channels have no weight other than zero"
                found.append(Finding(node.name, "info", text))
            found += _overflow(prepared, node, qconfig, weight, bias, others)
    return found


def _overflow(
    prepared: QuantizedModel, node: OpNode, qconfig: QConfig, weight: Tensor, bias: Tensor | None, others: list[int]
) -> list[Finding]:
    """Findings on output channels whose sum of products, or bias at scale s_in s_w, exceeds int32."""
    quantizer = prepared.weights[node.weight or ""]
    dtypes = [d for d in input_dtypes(prepared.graph, qconfig, node.name)[:1] if d.is_integer]
    sources = prepared.graph.source(node.inputs[0]) if node.inputs else ()
    if quantizer.dtype is None or not quantizer.dtype.is_integer or not dtypes or not sources:
        return []
    codes = (weight / quantizer.scale).round().abs().sum(dim=others).double()
    found = []
    reach = codes * -dtypes[0].qmin
    if bool((reach > INT32).any()):
        int16 = dtypes[0] == QDtype.qint16  # int16 codes rarely are all at their largest at once: no certain overflow
        text = f"{int((reach > INT32).sum())} channels can overflow the int32 accumulator"
        text += " if all qint16 inputs have their largest codes" if int16 else ""
        found.append(Finding(node.name, "check" if int16 else "error", text))
    scale = float(prepared.outputs[prepared.graph.by_name[sources[0]].quantizer or ""].scale)
    if bias is not None and scale > 0.0 and bias.numel() == quantizer.scale.numel():
        steps = (bias.double() / (scale * quantizer.scale.flatten().double())).abs()
        if bool((steps > INT32).any()):
            text = f"the bias of {int((steps > INT32).sum())} channels exceeds int32 at scale s_in x s_w"
            found.append(Finding(node.name, "error", text))
    return found
