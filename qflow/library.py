"""qflow without configuration files: prepare, calibrate, check and cost of any nn.Module in a few lines.

    prepared = qflow.prepare(model, images, qconfig_setter=qflow.default_calibration_qconfig_setter, march="nash-m")
    findings = qflow.calibrate(prepared, loader)
    print(qflow.check_text(qflow.check(prepared)))
    print(qflow.cost(prepared).latency_ms)
    outputs = prepared(images)          # as the device computes them

The calls and states carry the plugin's names; `docs/library.md` sets them side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

from torch import Tensor, nn

from qflow.analysis.calibration_check import calibration_findings
from qflow.analysis.model_check import check_model
from qflow.analysis.tables import Finding, ModelCheck
from qflow.config.device_file import load_cost, load_rules
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.plugin_names import plugin_ranking
from qflow.core.qconfig import QConfig
from qflow.core.setter import HighPrecisionOutput, Setter, TemplateSetter, resolve
from qflow.core.settings import CalibrationSettings
from qflow.cost.latency import CostReport, predict
from qflow.quant import prepare as engine
from qflow.quant.calibrate import CalibrationStats, apply_scales, collect
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.run import Collected


class FakeQuantState(str, Enum):
    """The plugin's states: what the quantizers of a prepared model do."""

    CALIBRATION = "calibration"
    """Float values pass, statistics are gathered."""
    VALIDATION = "validation"
    """Values are quantized with the calibrated scales."""
    FLOAT = "_float"
    """Exactly the float model."""


class Prepared(QuantizedModel):
    """A prepared model that knows its qconfig: what was asked, and what the device will run."""

    requested: QConfig
    applied: QConfig
    march: str
    settings: CalibrationSettings = CalibrationSettings()
    stats: CalibrationStats | None = None
    findings: tuple[Finding, ...] = ()


def prepare(
    model: nn.Module,
    example_inputs: Any,
    qconfig_setter: Setter | Sequence[Setter] = (),
    march: str = "nash-m",
    skip: Sequence[str | type[nn.Module]] = (),
) -> Prepared:
    """Trace, fuse and configure `model` (in eval mode), which is left as it is. The first setter that answers wins.

    `example_inputs` is a tensor, a tuple to splat or a dict of keywords, batch first; `march` a name (nash-m, nash-e,
    nash-m-oe32, ...) or a rules file; `skip` modules that stay float. Operators that no setter answers for are int8,
    outputs of GEMMs that leave the model are high-precision. Raises ModelError or ConfigError in one line.
    """
    given = (qconfig_setter,) if callable(qconfig_setter) else tuple(qconfig_setter)
    prepared = engine.prepare(model, example_inputs, skip)
    prepared.__class__ = Prepared
    assert isinstance(prepared, Prepared)
    prepared.march = march
    configure(prepared, (*given, HighPrecisionOutput(), TemplateSetter(QDtype.qint8)))
    return prepared


def configure(prepared: Prepared, setters: Sequence[Setter]) -> QConfig:
    """Give a prepared model another qconfig; statistics stay, scales follow anew. Returns what the device will run."""
    rules = load_rules(prepared.march)
    prepared.requested = resolve(prepared.graph, setters, rules.march)
    prepared.applied = apply_rules(
        prepared.graph, prepared.requested, rules, ranking=plugin_ranking(setters, prepared.graph)
    )
    prepared.configure(prepared.applied)
    if prepared.stats is not None:
        _set_scales(prepared)
    return prepared.applied


def calibrate(
    prepared: Prepared, data: Iterable[Any], settings: CalibrationSettings | None = None, steps: int | None = None
) -> tuple[Finding, ...]:
    """One pass over `data`, scales by `settings`, quantizers on. Returns what calibration found.

    Items of `data` are model inputs, or (inputs, target) pairs as data loaders give them: more positional items than
    `forward` takes are dropped. At most `steps` batches are read. Raises DataError for empty data or NaN.
    """
    prepared.settings = settings or prepared.settings

    def batches() -> Iterable[tuple[Any, int]]:
        for step, batch in enumerate(data):
            if steps is not None and step >= steps:
                return
            inputs = _inputs(prepared, batch)
            yield inputs, _size(inputs)

    set_fake_quantize(prepared, FakeQuantState.FLOAT)
    prepared.stats = collect(prepared, batches(), sampling=prepared.settings.sampling)
    _set_scales(prepared)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    return prepared.findings


def set_fake_quantize(prepared: Prepared, state: FakeQuantState) -> None:
    """Switch all quantizers; forward passes between CALIBRATION and VALIDATION are what calibrates."""
    gathered, prepared._collect = prepared._collect, None
    if gathered is not None and gathered.histograms:
        prepared.stats = CalibrationStats(gathered.histograms, 0, 0, gathered.calls, gathered.weights)
        _set_scales(prepared)
    if state == FakeQuantState.CALIBRATION:
        prepared._collect = Collected(prepared.settings.sampling)
    elif state == FakeQuantState.VALIDATION and prepared.stats is None:
        raise ModelError("Quantizers need scales, but got an uncalibrated model. Call qflow.calibrate first.")
    for quantizer in prepared._keys().values():
        quantizer.enabled = state == FakeQuantState.VALIDATION


def check(prepared: Prepared) -> ModelCheck:
    """The model check: structure and qconfig, and what calibration showed if there was one."""
    return check_model(
        prepared.graph, prepared.requested, prepared.applied, prepared.findings, prepared.settings.method
    )


def cost(prepared: Prepared) -> CostReport:
    """Predicted cost at the shape of the example inputs, with its interval or the reason for a refusal."""
    return predict(prepared.graph, prepared.applied, load_cost(prepared.march))


def _set_scales(prepared: Prepared) -> None:
    assert prepared.stats is not None
    extra = apply_scales(prepared, prepared.stats, prepared.applied, prepared.settings)
    prepared.findings = calibration_findings(prepared, prepared.stats, prepared.applied, extra)


def _inputs(prepared: Prepared, batch: Any) -> Any:
    if isinstance(batch, (tuple, list)):
        count = sum(node.kind == "input" for node in prepared.graph.nodes)
        return tuple(batch[: max(count, 1)])
    return batch


def _size(inputs: Any) -> int:
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    return next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 1)
