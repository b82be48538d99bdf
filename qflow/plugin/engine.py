"""engine=plugin: Horizon's plugin prepares, calibrates and evaluates the models of trials, by its public names.

The plugin gets the requested qconfig and lowers by itself what the device does not take. Where its dtypes differ from
those that qflow predicted, the trial says so and has the plugin's. The graph, by which operators are named and priced,
is qflow's. What is stored is qflow's model with the plugin's dtypes and scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from qflow.analysis.measures.tables import Finding
from qflow.core.engine import EngineName
from qflow.core.errors import ConfigError, TrialError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, TrialSettings
from qflow.plugin.names import plugin_names
from qflow.plugin.prepared import PluginModel, prepared_by_plugin, stubbed
from qflow.plugin.public import Public
from qflow.plugin.qconfigs import plugin_qconfig, require_expressible
from qflow.plugin.stubs import Stubbed
from qflow.quant.model.calibrate import apply_scales
from qflow.quant.model.model_state import forward_state
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import batch_size, cut
from qflow.trial.engine import Train
from qflow.trial.record import EngineCall
from qflow.trial.shared import SharedState

SHOWN = 2  # operators that a line on the console names
TRAINS = "engine=plugin does not train, but got qat.steps={steps}. Use qat=none, or train with engine=qflow."


@dataclass
class PluginQuantized:
    """One trial's model of the plugin, and qflow's model with its dtypes and scales."""

    plugin: PluginModel
    model: QuantizedModel
    qconfig: QConfig
    samples: int
    names: Mapping[str, str]
    """Operator -> its module in the plugin's model, for those that have one."""
    found: tuple[Finding, ...] = ()
    overflowed: dict[str, int] = field(default_factory=dict)
    """Empty: the plugin does not count values beyond half precision."""

    @property
    def state(self) -> Any:
        """Dtypes and scales of the plugin, and of qflow's model, in which operators without a module keep theirs."""
        return [self.plugin.state, forward_state(self.model)]

    @property
    def calls(self) -> tuple[EngineCall, ...]:
        """All calls of the plugin since the trial began."""
        return tuple(self.plugin.public.calls)

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The plugin's model in its state VALIDATION; its evaluation is logged as one call."""
        with self.plugin.public.logged("model", "evaluation"):
            yield self.plugin.model

    def outputs(self, inputs: Any) -> dict[str, Tensor]:
        """Return the quantized output of each operator that has a module of the plugin."""
        return self.plugin.outputs(self.names, inputs)

    def trained(self, train: Train) -> Any:
        """Raise ConfigError: `check` has refused it before."""
        raise ConfigError(TRAINS.format(steps="some"))

    def findings(self, overflowed: Mapping[str, int]) -> tuple[Finding, ...]:
        """Return where the plugin differs from what qflow predicted."""
        return self.found


@dataclass
class PluginEngine:
    """Horizon's plugin as it is installed. Raises ConfigError on creation if there is none."""

    name: ClassVar[EngineName] = EngineName.plugin
    public: Public = field(default_factory=Public)

    @property
    def version(self) -> str:
        """The plugin with its version."""
        return f"horizon_plugin_pytorch {self.public.version}"

    def __post_init__(self) -> None:
        self._news = [
            f"{self.version} prepares, calibrates and evaluates trials; plugin_calls.json of a trial has every call",
            "bad cases, layers, sensitivities and repairs are computed by qflow's own engine",
        ]
        self._said: set[str] = set()

    def news(self) -> list[str]:
        """Return what this engine does, and each group of differences from the prediction, once."""
        found = [text for text in self._news if text not in self._said]
        self._said.update(found)
        self._news = []
        return found

    def check(self, shared: SharedState, settings: TrialSettings) -> None:
        """Raise ConfigError for what the plugin is not asked for."""
        if settings.qat.steps:
            raise ConfigError(TRAINS.format(steps=settings.qat.steps))
        refused: dict[str, object] = {
            "task.cached_attrs": shared.task.cached_attrs,
            "quant.skip": shared.skip,
            "quant.fold_functional_norms": shared.fold_functional_norms,
            "quant.split_shared": [name for name in shared.split_shared if name != "report"],
            "calibration.float16_clip": settings.calibration.float16_clip,
        }
        for key, value in refused.items():
            if value:
                shown = str(value).lower() if isinstance(value, bool) else list(value)  # type: ignore[call-overload]
                raise ConfigError(
                    f"engine=plugin works without {key}, but got {key}={shown}. Leave it out, or use engine=qflow."
                )

    def quantize(
        self, shared: SharedState, requested: QConfig, applied: QConfig, calibration: CalibrationSettings
    ) -> PluginQuantized:
        """Let the plugin prepare the float model under `requested` and calibrate it."""
        self.public.calls.clear()
        require_expressible(requested)
        prepared, example = shared.prepared, shared.example
        model = stubbed(self.public, shared.weights.model, example)
        names = modules_of(prepared, model, cut(example, batch_size(example), 0, 1))
        ranked = sorted(names, key=lambda op: -shared.scores.get(op, 0.0))  # of two int16 inputs, the first name stays
        qconfigs: dict[str, Any] = {}
        for op in ranked:
            if names[op] not in qconfigs:  # all calls of a module have one qconfig
                qconfigs[names[op]] = plugin_qconfig(self.public, requested.ops[op], calibration)
        made = prepared_by_plugin(self.public, model, example, qconfigs, shared.rules.march)
        made.calibrate(shared.calibration_batches(calibration))
        stats = shared.calibrate(calibration)
        known = {op: name for op, name in names.items() if name in made.modules}
        actual, found = as_the_plugin_has_it(prepared.graph, applied, made, known)
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            first = "; ".join(f"{finding.op} {finding.message}" for finding in found[:SHOWN])
            self._news.append(f"{first}{more} (model_check_result.txt of the trial)")
        apply_scales(prepared, stats, actual, calibration)
        found += take_scales(prepared, actual, made, known)
        return PluginQuantized(made, prepared, actual, stats.samples, known, tuple(found))


def modules_of(prepared: QuantizedModel, model: Any, sample: Any) -> dict[str, str]:
    """Return operator -> the name that its module should have in the plugin's model; without operators that have none.

    Names that the plugin generates are candidates: those that the prepared model lacks are reported.
    """
    within = isinstance(model, Stubbed)
    found = {}
    for name in plugin_names(prepared, sample).values():
        if within and name.op.startswith("quant["):
            stub = model.stubs.get(name.op.removeprefix("quant[").removesuffix("]"))
            if stub is not None:
                found[name.op] = stub
        elif name.plugin:
            found[name.op] = f"model.{name.plugin}" if within else name.plugin
    return found


def as_the_plugin_has_it(
    graph: ModelGraph, applied: QConfig, made: PluginModel, names: Mapping[str, str]
) -> tuple[QConfig, list[Finding]]:
    """Return the predicted qconfig with the plugin's dtypes, and a finding for each operator that differs.

    Raises TrialError where the plugin computes in float what the device does not: the metric would be too good.
    """
    if not names:
        raise TrialError(
            "The plugin's check lists the modules of a prepared model, but got none of this model's. See qflow doctor "
            "plugin."
        )
    changes, found = {}, []
    for op, predicted in applied.ops.items():
        module = made.modules.get(names.get(op, ""))
        if module is None:
            if not op.startswith("const["):  # the operator that reads a constant quantizes it
                text = "has no module in the plugin's model: its dtype and cost are as qflow predicts"
                found.append(Finding(op, "check", text))
            continue
        if module.output is None and predicted.output is not None and op not in graph.high_precision:
            raise TrialError(
                f"The plugin quantizes the operators that its device computes, but got {op} in float32, where qflow "
                f"predicted {predicted.output}. See where {module.name} is in its model_check_result.txt."
            )
        weight = module.weight if predicted.weight is not None and module.weight is not None else predicted.weight
        own = replace(predicted, output=module.output, weight=weight)
        if own.effective != predicted.effective:
            has, told = f"{module.output or 'float32'}", f"{predicted.output or 'float32'}"
            if weight != predicted.weight:
                has, told = f"{has}/{weight}", f"{told}/{predicted.weight}"
            text = f"the plugin has {has}, qflow predicted {told}: the trial is priced with {has}"
            if module.output != predicted.output:  # a scale that was given belongs to the dtype that was asked for
                own = replace(own, fixed_scale=None, known_range=None)
            changes[op] = replace(own, fallback=f"the plugin made it {has}")
            found.append(Finding(op, "check", text))
    return applied.with_ops(changes), found


def take_scales(
    prepared: QuantizedModel, actual: QConfig, made: PluginModel, names: Mapping[str, str]
) -> list[Finding]:
    """Give qflow's model the scales of the plugin; return a finding for each operator where that is not possible."""
    found: list[Finding] = []
    for node in prepared.graph.quantized:
        if (name := names.get(node.name)) is None:
            continue
        places = [(node.quantizer, f"{name} output", prepared.outputs)]
        places += [(inner, f"{name}{inner.removeprefix(node.name)} output", prepared.outputs) for inner in node.inner]
        places += [(node.weight, f"{name} weight", prepared.weights)] if node.weight else []
        missing = []
        for own, place, quantizers in places:
            quantizer = quantizers[own or ""]
            if quantizer.dtype is None or not quantizer.dtype.is_integer:
                continue
            scale = made.quantizers.get(place, ("", None))[1]
            if scale is None or scale.numel() != quantizer.scale.numel():
                missing.append(str(own))
                continue
            quantizer.set_scale(scale)
            if scale.numel() == 1 and float(scale) == 1.0:  # the plugin's scale where nothing was observed
                found.append(Finding(node.name, "check", f"the plugin's scale of {own} is 1: was it calibrated?"))
        if missing:
            text = f"the plugin's scale of {', '.join(missing)} was not found: qflow's model has its own"
            found.append(Finding(node.name, "check", text))
    return found
