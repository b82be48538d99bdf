"""The record of one evaluated trial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qflow.analysis.tables import ModelCheck
from qflow.core.qconfig import QConfig
from qflow.core.record import digest
from qflow.cost.records import CostReport
from qflow.quant.qat import TrainingReport


@dataclass(frozen=True)
class TrialResult:
    """One evaluated trial: the metric with its drop against float, the cost, and what explains both."""

    metric: float
    drop: float
    samples: int
    qconfig: QConfig
    requested: QConfig
    cost: CostReport
    check: ModelCheck
    scales: dict[str, float | list[float]]
    calibration_samples: int
    shared: bool
    """True if an earlier trial had the same qconfig and calibration: nothing was run again."""
    training: TrainingReport | None = None
    """What QAT did; None for a trial that only calibrates."""
    weights: dict[str, Any] | None = None
    """Trained tensors by the float model's own names."""

    @property
    def scales_digest(self) -> str:
        """Names the calibrated scales: equal digests, equal numbers."""
        return digest(self.scales)
