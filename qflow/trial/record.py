"""The record of one evaluated trial, and the metrics of its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qflow.analysis.measures.tables import ModelCheck
from qflow.core.dtype import QDtype
from qflow.core.qconfig import QConfig
from qflow.core.record import digest
from qflow.cost_model.records import CostReport
from qflow.cost_model.table import COST_METRICS
from qflow.quant.train.report import TrainingReport
from qflow.repair.base.contract import RepairTable


@dataclass(frozen=True)
class Evaluation:
    """The result of one pass over the evaluation data."""

    metric: float
    samples: int
    overflowed: Mapping[str, int] = field(default_factory=dict)
    """Number of values beyond the range of fp16, by fp16 operator."""
    scores: tuple[float, ...] = ()
    """Score of each sample in order, of a metric that gives them; with it the noise of a difference can be paired."""
    details: Mapping[str, float] = field(default_factory=dict)
    """What the metric says beside its value, by name (tasks/details.py)."""


@dataclass(frozen=True)
class EngineCall:
    """One call of a public name of a foreign engine."""

    name: str
    arguments: str
    """In short: shapes in place of tensors, types in place of objects."""
    seconds: float
    failed: str = ""
    """What it raised, in one line."""


@dataclass(frozen=True)
class TrialResult:
    """One evaluated trial: the metric, its drop against float, the cost, and the records that explain them."""

    metric: float
    drop: float
    samples: int
    qconfig: QConfig
    requested: QConfig
    cost: CostReport
    slowdown: float
    """Predicted latency over that with every operator at int8."""
    check: ModelCheck
    scales: dict[str, float | list[float]]
    quantizers: dict[str, Any]
    """Dtypes and switches of every quantizer, and the scales of requantized inputs (quant/model/model_state.py)."""
    calibration_samples: int
    evaluated: bool
    """False if the metric came from the memory or from the cache on disk, without a pass over the evaluation data."""
    scores: tuple[float, ...] = ()
    """Score of each evaluation sample, as in Evaluation."""
    details: Mapping[str, float] = field(default_factory=dict)
    """What the metric says beside its value, as in Evaluation."""
    training: TrainingReport | None = None
    """Report of QAT; None for a trial without training."""
    repair: RepairTable | None = None
    """What the repair tried; None for a trial without one."""
    weights: dict[str, Any] | None = None
    """Tensors by the float model's own names, if training or a repair has changed some."""
    calls: tuple[EngineCall, ...] = ()
    """What was called of a foreign engine, in order."""

    @property
    def scales_digest(self) -> str:
        """Digest of the calibrated scales: equal digests mean equal scales."""
        return digest(self.scales)


def _of_cost(read: Callable[[CostReport], float]) -> Callable[[TrialResult], float]:
    return lambda trial: read(trial.cost)


def _loss(trial: TrialResult) -> float | None:
    return trial.training.losses[-1] if trial.training and trial.training.losses else None


DETAIL = "detail/"  # begins the name of what the metric says beside its value

RUN_METRICS: Mapping[str, Callable[[TrialResult], float | None]] = {
    "accuracy/drop": lambda trial: trial.drop,
    **{name: _of_cost(read) for name, read in COST_METRICS.items()},
    "cost/slowdown": lambda trial: trial.slowdown,
    "qconfig/int16_ratio": lambda trial: trial.qconfig.share(QDtype.qint16),
    "qconfig/n_int16": lambda trial: float(len(trial.qconfig.names(QDtype.qint16))),
    "qconfig/n_int16_weights": lambda trial: float(
        sum(op.weight == QDtype.qint16 for op in trial.qconfig.ops.values())
    ),
    "qconfig/n_float16": lambda trial: float(len(trial.qconfig.names(QDtype.float16))),
    "qconfig/n_int8": lambda trial: float(len(trial.qconfig.names(QDtype.qint8))),
    "calibration/samples": lambda trial: float(trial.calibration_samples),
    "qat/steps": lambda trial: float(trial.training.steps) if trial.training else None,
    "qat/loss": _loss,
}
"""Metrics of a run beside the task's own, by name; `objective.optimize` may name them. None if a trial lacks one."""


def run_metrics(trial: TrialResult, accuracy: str) -> dict[str, float]:
    """Return the metrics of a trial's MLflow run: the task's metric as `accuracy`, its details, and RUN_METRICS."""
    found = {name: read(trial) for name, read in RUN_METRICS.items()}
    known = {name: value for name, value in found.items() if value is not None}
    return {accuracy: trial.metric, **known, **detail_metrics(trial.details)}


def detail_metrics(details: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Return what a metric says beside its value under the names that it has on a run."""
    return {f"{prefix}{DETAIL}{name}": value for name, value in details.items()}


def metrics_of(mix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a trial under the names that they have on its study's run: `best/map`, `best/detail/small`.

    Without the word before the slash, but for details, which may have any name.
    """
    return {f"{mix}/{k if k.startswith(DETAIL) else k.split('/', 1)[1]}": v for k, v in metrics.items()}
