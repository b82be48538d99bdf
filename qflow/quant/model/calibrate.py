"""Calibration: one pass over the data collects statistics, from which scales for any method and dtype are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qflow.core.dtype import QDtype
from qflow.core.errors import DataError, QflowError
from qflow.core.graph import OpKind
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.model.run import Collected
from qflow.quant.model.weighted import WeightedLeaf
from qflow.quant.trace.calling import call_model
from qflow.quant.values.observer import Histogram


@dataclass(frozen=True)
class CalibrationStats:
    """Statistics of one pass: a histogram for each quantizer, over `samples` samples in `steps` batches."""

    histograms: dict[str, Histogram]
    samples: int
    steps: int
    calls: dict[str, dict[str, Histogram]] = field(default_factory=dict)
    """Quantizer that several calls share -> a histogram for each call."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Weights of functionals, by quantizer name."""
    unseen: tuple[str, ...] = ()
    """Operators that ran in this pass and not while the model was traced: they ran in float."""


def collect(
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, int]],
    on_step: Callable[[int], None] = lambda step: None,
    sampling: int = CalibrationSettings.sampling,
    by_batch: bool = False,
) -> CalibrationStats:
    """Run the float model over `batches` of (model inputs, batch size) and gather all statistics in one pass.

    `by_batch` keeps the statistics of each batch too, which an averaging constant needs.

    The model is in eval mode meanwhile, because the noise of dropout would enter the statistics and batch norms would
    update theirs. Raises DataError for an empty calibration set, NaN, or data that the model does not take.
    """
    samples = steps = 0
    with torch.no_grad(), _evaluating(prepared), prepared.collecting(sampling, by_batch) as found:
        for inputs, size in batches:
            _run(prepared, inputs)
            samples, steps = samples + size, steps + 1
            on_step(steps)
    if not steps:
        raise DataError("Calibration needs data, but got an empty calibration set. Check task.data.")
    return gathered(prepared, found, samples, steps)


@contextmanager
def _evaluating(prepared: QuantizedModel) -> Iterator[None]:
    training = [module for module in prepared.modules() if module.training]
    if training:  # else visiting every module takes as long as its forward, on small networks
        prepared.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _run(prepared: QuantizedModel, inputs: Any) -> None:
    try:
        call_model(prepared, inputs)
    except (QflowError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # the user's forward may raise anything
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"The model must run on the calibration data, but got: {text.rstrip('.')}. Check task.data, or the items "
            "given to calibrate."
        ) from error


def gathered(prepared: QuantizedModel, found: Collected, samples: int = 0, steps: int = 0) -> CalibrationStats:
    """The statistics in `found` as a record; `found` comes from the last forward passes of `prepared`."""
    for quantizer in prepared.weights.values():
        quantizer.forget_weight()  # the statistics are those of the present weights
    unseen = tuple(sorted(prepared.unseen))
    return CalibrationStats(found.histograms, samples, steps, found.calls, found.weights, unseen)


def apply_scales(
    prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig, settings: CalibrationSettings
) -> list[str]:
    """Set dtypes from `qconfig` and scales from `stats`.

    Returns findings about operators that the data did not reach or whose values were always zero. Their quantizers stay
    at float32, because any scale would clip later values to about 0. Weights take minmax per output channel of the
    folded weight, whatever the method is, as in the plugin.
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
            exact = node.kind == OpKind.constant or quantizer.keeps_mask  # zeros and masks are exact on every grid
            if not exact or histogram is None:
                why = "was not reached by" if histogram is None else "was always zero on"
                findings.append(f"{node.name} {why} the calibration data: left unquantized, give it a fixed scale")
        else:
            # int16 takes the largest value with a margin; an observer from a template concerns int8 only
            method = op.observer if quantizer.dtype == QDtype.qint8 or op.own_observer else None
            quantizer.set_scale(histogram.scale(quantizer.dtype, settings, method))
    findings += _set_inner_scales(prepared, stats, settings)
    findings += _set_requant_scales(prepared, stats, qconfig, settings)
    set_weight_scales(prepared, stats, settings)
    return findings


def _set_inner_scales(prepared: QuantizedModel, stats: CalibrationStats, settings: CalibrationSettings) -> list[str]:
    """Set the scales of the values inside norms and softmaxes, as of any int16 value."""
    findings = []
    for node in prepared.graph.quantized:
        for name in node.inner:
            quantizer, histogram = prepared.outputs[name], stats.histograms.get(name)
            quantizer.clear_scale()
            quantizer.clip = settings.float16_clip
            if quantizer.dtype is None or not quantizer.dtype.is_integer:
                continue
            if histogram is not None and histogram.largest:
                quantizer.set_scale(histogram.scale(quantizer.dtype, settings))
                continue
            quantizer.dtype = QDtype.float32
            if histogram is not None:  # if it is None, the finding about the operator says why
                findings.append(f"{name} was always zero on the calibration data: left unquantized")
    return findings


def _set_requant_scales(
    prepared: QuantizedModel, stats: CalibrationStats, qconfig: QConfig, settings: CalibrationSettings
) -> list[str]:
    """Set the scales of inputs that are requantized to another dtype; each covers all values that arrive there.

    Those are the values of all sources (an in-place write merges several) over all calls of a shared module. Fixed
    scales and known ranges of the sources are respected.
    """
    findings = []
    quantizers: dict[str, Any] = {str(q.name): q for q in prepared.requants}
    for name, op in qconfig.ops.items():
        for position, dtype in enumerate(op.input or ()):
            if dtype is None or not dtype.is_integer:
                continue
            quantizer = quantizers[f"{name}:{position}"]
            reach = max(
                _reach(prepared, stats, qconfig, settings, s, dtype) for s in _sources(prepared, name, position)
            )
            if reach == 0.0:
                quantizer.dtype = QDtype.float32  # type: ignore[assignment]
                findings.append(f"{name} input {position} has no range: left as its producer gives it")
            else:
                quantizer.set_scale(reach / _divisor(dtype, settings))
    return findings


def _sources(prepared: QuantizedModel, name: str, position: int) -> list[str]:
    """Operators whose quantized results reach this input of `name`, over all calls that share its quantizer."""
    graph = prepared.graph
    calls = [n for n in graph.nodes if n.quantizer == graph.by_name[name].quantizer and position < len(n.inputs)]
    return [source for call in calls for source in graph.source(call.inputs[position])]


def _reach(
    prepared: QuantizedModel,
    stats: CalibrationStats,
    qconfig: QConfig,
    settings: CalibrationSettings,
    source: str,
    dtype: QDtype,
) -> float:
    """The largest |x| of `source`: from its fixed scale or known range, else from calibration; 0 if unknown."""
    quantizer = prepared.graph.by_name[source].quantizer
    op = next(qconfig.ops[n.name] for n in prepared.graph.quantized if n.quantizer == quantizer)
    if op.known_range is not None and op.fixed_scale is None:
        return max(abs(bound) for bound in op.known_range)
    if op.fixed_scale is not None and op.output is not None and op.output.is_integer:
        return op.fixed_scale * -op.output.qmin
    histogram = stats.histograms.get(quantizer or "")
    return 0.0 if histogram is None else histogram.threshold(dtype, settings)


def _divisor(dtype: QDtype, settings: CalibrationSettings) -> float:
    return -dtype.qmin - (0.5 if settings.divisor == "plugin" else 0.0)


def folded_weights(prepared: QuantizedModel, stats: CalibrationStats) -> dict[str, Tensor]:
    """Weight quantizer -> its weight with the batch norm folded in; functionals' weights as the pass saw them."""
    modules = dict(prepared.model.named_modules())
    leaves = {name: modules.get(name) for name in prepared.weights}
    with torch.no_grad():
        own = {name: leaf.folded()[0].detach() for name, leaf in leaves.items() if isinstance(leaf, WeightedLeaf)}
    return {**stats.weights, **own}


def set_weight_scales(prepared: QuantizedModel, stats: CalibrationStats, settings: CalibrationSettings) -> None:
    """Set the scales of all weights: largest |w| per output channel (or `weight_axis`), batch norm folded in."""
    weights = folded_weights(prepared, stats)
    with torch.no_grad():
        for name, quantizer in prepared.weights.items():
            quantizer.clear_scale()
            if quantizer.dtype is None or not quantizer.dtype.is_integer:
                continue
            weight = weights.get(name)
            if weight is None:
                quantizer.dtype = QDtype.float32  # not reached: the finding about its operator's output says so
                continue
            quantizer.follow(weight)
            others = [d for d in range(weight.ndim) if d != quantizer.axis]
            quantizer.set_scale(weight.abs().amax(dim=others) / _divisor(quantizer.dtype, settings))
