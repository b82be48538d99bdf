"""What the quantized model loses in the metric, as it is, after each repair step alone, and after all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qflow
from benchmarks.repair_networks.stress import steps_at, stressed
from qflow.api.prepared import Prepared
from qflow.quant.trace.calling import batch_size
from qflow.repair.base.contract import RepairTable
from qflow.repair.base.measure import HeldOut
from qflow.tasks.task import Task, batches, evaluate, model_inputs

BATCH = 32


@dataclass(frozen=True)
class State:
    """A quantized model on the evaluation samples."""

    model: Prepared
    drop: float
    """Loss of the metric against float."""
    scores: Tensor
    """Score of each sample, float64."""
    error: float
    """Relative error of the outputs, as a repair measures it (qflow/repair/base/measure.py)."""
    table: RepairTable | None = None
    seconds: float = 0.0
    """CPU time of the repair."""

    def noise(self, other: State) -> float:
        """Standard error of the difference of the metric to another state on the same samples."""
        return float((self.scores - other.scores).std()) / len(self.scores) ** 0.5


class Subject:
    """A task, prepared once, whose states are compared on the same samples."""

    def __init__(self, task: Task, bits: int) -> None:
        self.task, self.bits = task, bits
        self.data = [model_inputs(task, batch) for batch, _ in batches(task, "calibration", BATCH)]
        self.samples = sum(batch_size(inputs) for inputs in self.data)
        self.prepared = qflow.prepare(task.model, self.data[0])
        if bits < 8:
            stressed(self.prepared)
        qflow.set_fake_quantize(self.prepared, qflow.FakeQuantState.FLOAT)
        held = [(model_inputs(task, batch), size) for batch, size in batches(task, "evaluation", BATCH, limit=8)]
        self._held = HeldOut(self.prepared, held)
        self.float_metric, self.float_scores = self._evaluated(task.model)

    def _evaluated(self, model: Any) -> tuple[float, Tensor]:
        scores: list[Tensor] = []
        metric, _ = evaluate(self.task, model, 2 * BATCH, on_scores=scores.append)
        return metric, torch.cat(scores).double()

    def state(self, steps: Sequence[str]) -> State:
        """The model after these steps, with all operators at int8; without a step it is calibrated as it is."""
        start = time.process_time()
        with steps_at(self.bits):
            model, table = qflow.repair_model(self.prepared, self.data, steps=steps)
        spent = time.process_time() - start
        metric, scores = self._evaluated(model)
        error = float(self._held.errors(model).mean())
        return State(model, self.task.drop(self.float_metric, metric), scores, error, table, spent)

    def passes(self, state: State) -> float:
        """Passes over the calibration samples that the repair took, with its calibrations and measurements: FFE."""
        assert state.table is not None
        return state.table.forwards / self.samples
