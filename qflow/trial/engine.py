"""What a trial needs of the engine that quantizes its model, and qflow's own engine.

A trial asks for one thing: the model under its qconfig, calibrated. What it gets back runs, tells the dtypes that it
computes with after the device's rules, and has a model of qflow's with these dtypes and scales, which is what is
stored, loaded and exported. Searching, pricing, tracking and promoting know nothing else of an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from qflow.analysis.measures.tables import Finding
from qflow.core.engine import EngineName
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, TrialSettings
from qflow.quant.model.calibrate import CalibrationStats, apply_scales
from qflow.quant.model.model_state import forward_state
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.quant.train.report import TrainingReport
from qflow.trial.findings import findings_of, require_all_ran
from qflow.trial.record import EngineCall
from qflow.trial.shared import SharedState

Train = Callable[[QuantizedModel], tuple[QuantizedModel, TrainingReport]]
"""Trains a copy of a calibrated model of qflow's."""


class Quantized(Protocol):
    """A model that an engine has quantized and calibrated."""

    @property
    def model(self) -> QuantizedModel:
        """Qflow's model with the dtypes and scales of this engine."""

    @property
    def qconfig(self) -> QConfig:
        """The precision of every operator after the device's rules, as this engine applied them."""

    @property
    def state(self) -> Any:
        """Plain values: with equal states and float weights, the model computes equal numbers."""

    @property
    def samples(self) -> int:
        """Number of calibration samples."""

    @property
    def overflowed(self) -> dict[str, int]:
        """Number of values beyond the range of fp16 in what ran, by operator; empty if the engine does not count."""

    @property
    def calls(self) -> tuple[EngineCall, ...]:
        """What was called of a foreign engine so far; empty for qflow's own."""

    def running(self) -> AbstractContextManager[nn.Module]:
        """Return a context whose model takes the float model's inputs and gives its outputs, quantized."""

    def outputs(self, inputs: Any) -> dict[str, Tensor]:
        """Return the quantized output of each operator of the qconfig in a run on `inputs` (of its first call)."""

    def trained(self, train: Train) -> tuple[Quantized, TrainingReport]:
        """Return the model after `train`. Raises ConfigError if this engine does not train."""

    def findings(self, overflowed: Mapping[str, int]) -> tuple[Finding, ...]:
        """Return what the user should know of the calibration and of values beyond fp16."""


class Engine(Protocol):
    """Quantizes the models of trials."""

    name: ClassVar[EngineName]

    @property
    def version(self) -> str:
        """What numbers depend on beside qflow's own version; empty for qflow's engine."""

    def news(self) -> list[str]:
        """Return what the user should know of this engine and was not returned before."""

    def check(self, shared: SharedState, settings: TrialSettings) -> None:
        """Raise ConfigError for settings that this engine cannot follow."""

    def quantize(
        self, shared: SharedState, requested: QConfig, applied: QConfig, calibration: CalibrationSettings
    ) -> Quantized:
        """Return the model calibrated under `requested`, of which the device should make `applied`."""


@dataclass(frozen=True)
class OwnQuantized:
    """The prepared model of a study with the dtypes and scales of one trial; the next trial replaces them."""

    shared: SharedState
    model: QuantizedModel
    qconfig: QConfig
    stats: CalibrationStats
    calibrated: list[str]
    """Findings of `apply_scales`."""
    calls: tuple[EngineCall, ...] = ()

    @property
    def state(self) -> Any:
        """Dtypes, switches and scales of all quantizers."""
        return forward_state(self.model)

    @property
    def samples(self) -> int:
        """Number of calibration samples."""
        return self.stats.samples

    @property
    def overflowed(self) -> dict[str, int]:
        """Values beyond half precision by fp16 operator."""
        return dict(self.model.overflowed)

    @contextmanager
    def running(self) -> Iterator[QuantizedModel]:
        """All quantizers are on inside. Raises ModelError on leaving if one of them did not run."""
        with self.model.quantized():
            yield self.model
            require_all_ran(self.model)

    def outputs(self, inputs: Any) -> dict[str, Tensor]:
        """Return the result of each operator after its quantizer."""
        owners, at = {node.quantizer: node.name for node in self.model.graph.quantized}, self.model.plan.output_at
        seen: dict[str, Tensor] = {}

        def keep(call: str, value: Tensor) -> None:  # of a fused group, its last operator is quantized
            if (op := owners.get(at.get(call))) is not None:
                seen.setdefault(op, value)

        self.model.watch = keep
        try:
            with torch.no_grad(), self.model.quantized() as model:
                call_model(model, inputs)
                quantizers = {op: model.outputs[name or ""] for name, op in owners.items()}
                return {op: quantizers[op](value) for op, value in seen.items()}
        finally:
            self.model.watch = None

    def trained(self, train: Train) -> tuple[OwnQuantized, TrainingReport]:
        """Return this calibration on the trained copy, with the report of the training."""
        model, report = train(self.model)
        return replace(self, model=model), report

    def findings(self, overflowed: Mapping[str, int]) -> tuple[Finding, ...]:
        """Return the findings of calibration and evaluation."""
        return findings_of(self.model, self.stats, self.qconfig, self.calibrated, overflowed, self.shared.precisions)


class OwnEngine:
    """qflow's engine: all trials share one prepared model and one calibration pass."""

    name: ClassVar[EngineName] = EngineName.qflow
    version = ""

    def news(self) -> list[str]:
        """Nothing: qflow says elsewhere what it does."""
        return []

    def check(self, shared: SharedState, settings: TrialSettings) -> None:
        """All settings are this engine's own."""

    def quantize(
        self, shared: SharedState, requested: QConfig, applied: QConfig, calibration: CalibrationSettings
    ) -> OwnQuantized:
        """Set dtypes and scales of the shared model."""
        stats = shared.calibrate(calibration)
        calibrated = apply_scales(shared.prepared, stats, applied, calibration)
        return OwnQuantized(shared, shared.prepared, applied, stats, calibrated)
