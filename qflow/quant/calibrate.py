"""Calibration: one pass over the data gives statistics; scales for any method and dtype follow without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.errors import DataError
from qflow.core.graph import OpKind
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.calling import call_model
from qflow.quant.observer import Histogram
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.weighted import WeightedLeaf


@dataclass(frozen=True)
class CalibrationStats:
    """What one pass saw: a histogram a quantizer, over `samples` samples in `steps` batches."""

    histograms: dict[str, Histogram]
    samples: int
    steps: int
    calls: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    """Where calls share a quantizer: each call apart."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of functionals, by quantizer name."""


def collect(
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, int]],
    on_step: Callable[[int], None] = lambda step: None,
    sampling: int = CalibrationSettings.sampling,
) -> CalibrationStats:
    """Run the float model over `batches` of (model inputs, batch size) and gather all statistics in one pass.

    Raises DataError for an empty calibration set or NaN.
    """
    samples = steps = 0
    with torch.no_grad(), prepared.collecting(sampling) as found:
        for inputs, size in batches:
            call_model(prepared, inputs)
            samples, steps = samples + size, steps + 1
            on_step(steps)
    if not steps:
        raise DataError("Calibration needs data, but got an empty calibration set. Check task.data.")
    return CalibrationStats(found.histograms, samples, steps, found.calls, found.weights)


def apply_scales(
    prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig, settings: CalibrationSettings
) -> list[str]:
    """Set dtypes from `qconfig` and scales from `stats`; returns findings (never reached, always zero).

    A quantizer without a range stays at float32, because any scale would clip what comes later to about 0.
    Weights take minmax per output channel of the folded weight whatever the method, as in the plugin.
    """
    prepared.configure(qconfig)
    findings = []
    for node in prepared.graph.quantized:
        quantizer = prepared.outputs[node.quantizer]  # type: ignore[index]
        quantizer.clear_scale()
        quantizer.clip = settings.float16_clip
        if quantizer.dtype is None or not quantizer.dtype.is_integer:
            continue
        op = qconfig.ops[node.name]
        fixed = op.pinned_scale()
        histogram = stats.histograms.get(quantizer.name)
        if fixed is not None:
            quantizer.set_scale(fixed)
        elif histogram is None or histogram.largest == 0.0:
            quantizer.dtype = QDtype.float32
            if node.kind != OpKind.constant or histogram is None:  # a constant zero is exact on every grid
                why = "was not reached by" if histogram is None else "was always zero on"
                findings.append(f"{node.name} {why} the calibration data: left unquantized, give it a fixed scale")
        else:
            # int16 takes the largest value with a margin, whatever observer the setter brings for int8
            method = op.observer if quantizer.dtype == QDtype.qint8 else None
            quantizer.set_scale(histogram.scale(quantizer.dtype, settings, method))
    findings += _set_requant_scales(prepared, stats, qconfig, settings)
    set_weight_scales(prepared, stats, settings)
    return findings


def _set_requant_scales(
    prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig, settings: CalibrationSettings
) -> list[str]:
    """Scales of inputs that ask for another dtype than their producer gives: from the producer's own statistics."""
    findings = []
    for name, op in qconfig.ops.items():
        for position, dtype in enumerate(op.input or ()):
            if dtype is None or not dtype.is_integer:
                continue
            quantizer = next(q for q in prepared.requants if q.name == f"{name}:{position}")
            producer = prepared.graph.by_name[name].inputs[position]
            source = prepared.graph.by_name[prepared.graph.source(producer)[0]]
            histogram = stats.histograms.get(source.quantizer or "")
            if histogram is None or histogram.largest == 0.0:
                quantizer.dtype = QDtype.float32  # type: ignore[assignment]
                findings.append(f"{name} input {position} has no range: left as its producer gives it")
            else:
                quantizer.set_scale(histogram.scale(dtype, settings))  # type: ignore[operator]
    return findings


def set_weight_scales(prepared: QuantizedModel, stats: CalibrationStats, settings: CalibrationSettings) -> None:
    """Scales of all weights: largest |w| of each output channel, batch norm folded in, over -qmin."""
    modules = dict(prepared.model.named_modules())
    with torch.no_grad():
        for name, quantizer in prepared.weights.items():
            quantizer.clear_scale()
            if quantizer.dtype is None or not quantizer.dtype.is_integer:
                continue
            leaf = modules.get(name)
            weight = leaf.folded()[0] if isinstance(leaf, WeightedLeaf) else stats.weights.get(name)
            if weight is None:
                quantizer.dtype = QDtype.float32  # its operator was not reached: reported with its output
                continue
            others = [d for d in range(weight.ndim) if d != quantizer.axis]
            divisor = -quantizer.dtype.qmin - (0.5 if settings.divisor == "plugin" else 0.0)
            quantizer.set_scale(weight.abs().amax(dim=others) / divisor)
