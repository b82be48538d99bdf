"""qflow without configuration files: functions to prepare, calibrate and check any nn.Module and to predict its cost.

    prepared = qflow.prepare(model, images, qconfig_setter=qflow.default_calibration_qconfig_setter, march="nash-m")
    findings = qflow.calibrate(prepared, loader)
    print(qflow.check_text(qflow.check(prepared)))
    print(qflow.cost(prepared).latency_ms)
    outputs = prepared(images)          # as the device computes them

Functions and states have the plugin's names; `docs/library.md` compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

from torch import Tensor, nn

from qflow.analysis.checks.calibration_check import calibration_findings
from qflow.analysis.checks.model_check import check_model, grouped
from qflow.analysis.checks.shared_check import reach_finding
from qflow.analysis.measures.tables import Finding, ModelCheck
from qflow.api.arguments import setters_of
from qflow.api.plugin_names import plugin_ranking
from qflow.api.prepared import Prepared, text_of_changed
from qflow.api.qat_mode import PrepareMethod, enter_qat, get_qat_mode, leave_qat, require_traced, with_keywords
from qflow.config.device_file import load_cost, load_rules
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, ModelError
from qflow.core.qconfig import QConfig
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, Setter, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.cost_model.latency import predict
from qflow.cost_model.records import CostReport
from qflow.quant.model import prepare as engine
from qflow.quant.model.calibrate import CalibrationStats, apply_scales, collect, gathered
from qflow.quant.model.graph_at_shape import graph_at
from qflow.quant.model.module_names import Named
from qflow.quant.model.run import Collected
from qflow.quant.model.sequences import in_order
from qflow.quant.trace.binding import example_of, inputs_of
from qflow.quant.trace.calling import batch_size, cut


class FakeQuantState(str, Enum):
    """The plugin's states of the quantizers of a prepared model."""

    CALIBRATION = "calibration"
    """Quantizers pass float values and collect statistics."""
    VALIDATION = "validation"
    """Quantizers quantize with the calibrated scales."""
    QAT = "qat"
    """Quantizers quantize and their scales follow the data; the model is in train mode."""
    FLOAT = "_float"
    """Quantizers are off: the model computes exactly as the float model."""


def prepare(
    model: nn.Module,
    example_inputs: Any = None,
    qconfig_setter: Setter | Sequence[Setter] = (),
    march: str = "nash-m",
    skip: engine.Skip = (),
    fold_functional_norms: bool = False,
    cached_attrs: str | Sequence[str] = (),
    split_shared: Named = "report",
    *,
    method: PrepareMethod | str = PrepareMethod.JIT_STRIP,
    example_kw_inputs: Mapping[str, Any] | None = None,
) -> Prepared:
    """Return a traced, fused and configured copy of `model` (in eval mode). The first setter that answers decides.

    `example_inputs` is a tensor, a tuple to splat or a dict of keywords, batch first; or a batch of the data loader, of
    which what `forward` does not take (targets, other keys) is left out. `march` is a name (nash-m,
    nash-e, nash-m-oe32, ...) or a device file. `skip` names modules (one or several) that stay float.
    `fold_functional_norms` folds an `F.batch_norm` on a module's own statistics (in a subclass of nn.BatchNorm2d, for
    example) as it would fold an nn.BatchNorm2d; the plugin goes by module type. `cached_attrs` names the attributes in
    which the model keeps state from call to call (`head.memory`); their present values start a sequence
    (`reset_state`). `split_shared` gives each call of a module that is called several times a quantizer of its own:
    with `auto` in all modules without parameters and buffers, else in those that it names. Operators without an answer
    are int8, and outputs of GEMMs that leave the model high-precision. `method` is JIT or JIT_STRIP.
    `example_kw_inputs` joins `example_inputs`. Raises ModelError or ConfigError.
    """
    given = setters_of(qconfig_setter)
    require_traced(method)
    example_inputs = example_of(model, with_keywords(model, example_inputs, example_kw_inputs))
    prepared = engine.prepare(model, example_inputs, skip, fold_functional_norms, cached_attrs, split_shared)
    prepared.__class__ = Prepared
    assert isinstance(prepared, Prepared)
    prepared.march, prepared.sample = march, cut(example_inputs, batch_size(example_inputs), 0, 1)
    prepared.qat_mode = get_qat_mode()
    configure(prepared, (*given, HighPrecisionOutput(), TemplateSetter(QDtype.qint8)))
    return prepared


def configure(prepared: Prepared, setters: Setter | Sequence[Setter]) -> QConfig:
    """Set another qconfig on a prepared model and recompute its scales; return the qconfig that the device will run.

    Without statistics (before calibration, after load_state_dict) the scale of every changed dtype is discarded.
    """
    rules, setters = load_rules(prepared.march), setters_of(setters)
    prepared.requested = resolve(prepared.graph, setters, rules.march)
    prepared.applied = apply_rules(
        prepared.graph, prepared.requested, rules, ranking=plugin_ranking(setters, prepared.graph)
    )
    prepared.configure(prepared.applied)
    if prepared.stats is not None:
        _set_scales(prepared)
    return prepared.applied


def calibrate(
    prepared: Prepared,
    data: Iterable[Any],
    settings: CalibrationSettings | None = None,
    steps: int | None = None,
    sequences: Sequence[int] | None = None,
) -> tuple[Finding, ...]:
    """Calibrate in one pass over `data`: set the scales by `settings`, switch the quantizers on, return the findings.

    Items of `data` are model inputs, or (inputs, target) pairs as from data loaders: what the example inputs lacked
    (more positional items, other keys of a dict) is left out. At most `steps` batches are read. With `cached_attrs` an
    item is a frame, of one sequence or of several at once, and `sequences` are the lengths of the sequences in items
    (None: one sequence); each begins at the start, as the model does afterwards. Raises DataError for empty data, NaN,
    or items that do not fit or are out of order.
    """
    prepared.settings = settings or prepared.settings
    data = frames_of(prepared, data, sequences)

    def batches() -> Iterable[tuple[Any, int]]:
        for step, batch in enumerate(data):
            if steps is not None and step >= steps:
                return
            inputs = inputs_of(prepared.model, prepared.sample, batch)
            yield inputs, _size(inputs)

    set_fake_quantize(prepared, FakeQuantState.FLOAT)
    by_batch = prepared.settings.averaging_constant is not None
    stats = collect(prepared, batches(), sampling=prepared.settings.sampling, by_batch=by_batch)
    adopt_stats(prepared, stats)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    if prepared.cached is not None:
        prepared.reset_state()
    return grouped(prepared.findings)


def frames_of(prepared: Prepared, data: Iterable[Any], sequences: Sequence[int] | None) -> Iterable[Any]:
    """Return `data`; for a model with state, with its state at the start before each sequence. Raises ConfigError."""
    if prepared.cached is not None:
        return in_order(data, sequences, prepared.reset_state)
    if sequences is not None:
        way_out = "Prepare the model with cached_attrs, or leave out sequences."
        raise ConfigError(f"sequences are for a model with state, but got one without cached_attrs. {way_out}")
    return data


def set_fake_quantize(prepared: Prepared, state: FakeQuantState) -> None:
    """Switch all quantizers. Forward passes between CALIBRATION and VALIDATION calibrate the model.

    QAT is for a training loop of your own (`qflow.train` has one): it sets train mode, moves scales with the data, and
    batch norms follow `prepared.qat_mode`. Any other state ends it: eval mode, scales as they are then. A copy that is
    made in the QAT state does not leave it. Raises ModelError for QAT or VALIDATION before the calibration.
    """
    if not isinstance(state, FakeQuantState):
        states = ", ".join(f"FakeQuantState.{s.name}" for s in FakeQuantState)
        raise ConfigError(f"A state is one of {states}, but got {state!r}. Write qflow.FakeQuantState.<name>.")
    leave_qat(prepared)
    found, prepared._collect = prepared._collect, None
    if found is not None and found.histograms:
        prepared.stats = gathered(prepared, found)
        _set_scales(prepared)
    if state == FakeQuantState.CALIBRATION:
        prepared._collect, prepared.unseen = _collected(prepared.settings), set()
    quantizes = state in (FakeQuantState.VALIDATION, FakeQuantState.QAT)
    if quantizes and prepared.uncalibrated:
        raise ModelError(
            f"Quantizers need scales, but got an uncalibrated model ({prepared.uncalibrated[0]} first). Call "
            "qflow.calibrate first."
        )
    prepared._calibrated = True  # a state that the user has chosen
    for quantizer in prepared._keys().values():
        quantizer.enabled = quantizes
    if state == FakeQuantState.QAT:
        enter_qat(prepared, prepared.qat_mode, prepared.applied, prepared.settings)


def check(prepared: Prepared) -> ModelCheck:
    """Return the model check: structure, qconfig, findings of a calibration, and operators that ran untraced since."""
    known = set(prepared.stats.unseen) if prepared.stats else set()
    since = [
        Finding(op, "check", f"ran{at}{line} but not while the model was traced: left in float")
        for op, at, line in (name.partition(" at ") for name in sorted(prepared.unseen - known))
    ]
    changed = prepared.follow_weights()
    edited = [Finding(changed[0], "check", text_of_changed(changed))] if changed else []
    reach = reach_finding(prepared, load_rules(prepared.march))
    found = (*reach, *prepared.findings, *since, *edited)
    return check_model(prepared.graph, prepared.requested, prepared.applied, found, prepared.settings.method)


def cost(prepared: Prepared, inputs: Any = None) -> CostReport:
    """Predict the cost at batch 1, with its interval or the reason for a refusal; its `shapes` names the input shapes.

    The shapes are those of `inputs` (in the form of the example inputs), or of the first example sample. Raises
    ModelError if the model does not run at these shapes.
    """
    graph = graph_at(prepared, prepared.sample if inputs is None else inputs)
    return predict(graph, prepared.applied, load_cost(prepared.march))


def adopt_stats(prepared: Prepared, stats: CalibrationStats) -> None:
    """Set scales and findings by the statistics of a pass over the model with its present weights."""
    prepared.stats = stats
    _set_scales(prepared)


def _set_scales(prepared: Prepared) -> None:
    assert prepared.stats is not None
    prepared.silent = apply_scales(prepared, prepared.stats, prepared.applied, prepared.settings)
    ranked(prepared, prepared.scores)


def ranked(prepared: Prepared, scores: Mapping[str, float]) -> None:
    """Keep activation sensitivities by operator, and renew the findings of calibration, which depend on them."""
    prepared.scores = scores
    if prepared.stats is not None:
        rules = load_rules(prepared.march)
        prepared.findings = calibration_findings(
            prepared, prepared.stats, prepared.applied, prepared.silent, rules, scores
        )


def _collected(settings: CalibrationSettings) -> Collected:
    return Collected(settings.sampling, settings.averaging_constant is not None)


def _size(inputs: Any) -> int:
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    return next((len(v) for v in values if isinstance(v, Tensor) and v.ndim), 1)
