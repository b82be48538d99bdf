"""Calibration: one pass over the data gives statistics; scales for any method and dtype follow without data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qflow.core.dtype import QDtype
from qflow.core.errors import DataError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.calling import call_model
from qflow.quant.observer import Histogram
from qflow.quant.prepare import QuantizedModel
from qflow.quant.weighted import WeightedLeaf


@dataclass(frozen=True)
class CalibrationStats:
    """What one pass saw: a histogram a quantizer, over `samples` samples in `steps` batches."""

    histograms: dict[str, Histogram]
    samples: int
    steps: int


def collect(
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, int]],
    on_step: Callable[[int], None] = lambda step: None,
) -> CalibrationStats:
    """Run the float model over `batches` of (model inputs, batch size) and gather all statistics in one pass.

    Raises DataError for an empty calibration set or values that are not finite.
    """
    samples = steps = 0
    with torch.no_grad(), prepared.collecting() as histograms:
        for inputs, size in batches:
            call_model(prepared, inputs)
            samples, steps = samples + size, steps + 1
            on_step(steps)
    if not steps:
        raise DataError("Calibration needs data, but got an empty calibration set. Check task.data.")
    return CalibrationStats(histograms, samples, steps)


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
        if quantizer.dtype is None or not quantizer.dtype.is_integer:
            continue
        fixed = qconfig.ops[node.name].pinned_scale()
        histogram = stats.histograms.get(quantizer.name)
        if fixed is not None:
            quantizer.set_scale(fixed)
        elif histogram is None or histogram.largest == 0.0:
            why = "was not reached by" if histogram is None else "was always zero on"
            findings.append(f"{node.name} {why} the calibration data: left unquantized, give it a fixed scale")
            quantizer.dtype = QDtype.float32
        else:
            quantizer.set_scale(histogram.scale(quantizer.dtype, settings))
    set_weight_scales(prepared, settings)
    return findings


def set_weight_scales(prepared: QuantizedModel, settings: CalibrationSettings) -> None:
    """Scales of all weights: largest |w| of each output channel, batch norm folded in, over -qmin."""
    modules = dict(prepared.model.named_modules())
    with torch.no_grad():
        for path, quantizer in prepared.weights.items():
            quantizer.clear_scale()
            if quantizer.dtype is None or not quantizer.dtype.is_integer:
                continue
            leaf = modules[path]
            assert isinstance(leaf, WeightedLeaf)
            weight, _ = leaf.folded()
            others = [d for d in range(weight.ndim) if d != quantizer.axis]
            divisor = -quantizer.dtype.qmin - (0.5 if settings.divisor == "plugin" else 0.0)
            quantizer.set_scale(weight.abs().amax(dim=others) / divisor)
