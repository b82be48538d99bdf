"""Two engines on one qconfig, operator by operator: dtypes, scales and outputs on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.tasks.task import batches, model_inputs
from qflow.trial.engine import Engine
from qflow.trial.evaluator import Evaluator
from qflow.trial.frames import evaluate_from_start


@dataclass(frozen=True)
class EngineRow:
    """One operator under two engines; a difference is relative to the first engine, None where one has no value."""

    op: str
    dtypes: tuple[str, str]
    """`output/weight` of each engine."""
    output: float | None
    """Norm of the difference of the quantized outputs, over the norm of the first."""
    scale: float | None
    weight_scale: float | None
    """The largest over the output channels."""

    @property
    def differs(self) -> bool:
        """True if anything differs."""
        return self.dtypes[0] != self.dtypes[1] or any((self.output, self.scale, self.weight_scale))


@dataclass(frozen=True)
class EngineComparison:
    """Two engines on one trial; the rows with the largest difference of outputs first."""

    engines: tuple[str, ...]
    metric_name: str
    metrics: tuple[float, ...]
    samples: int
    batch: int
    """Number of samples on which outputs were compared."""
    rows: tuple[EngineRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Side:
    name: str
    metric: float
    samples: int
    qconfig: QConfig
    scales: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    notes: tuple[str, ...]


def compare_engines(
    evaluator: Evaluator,
    requested: QConfig,
    applied: QConfig,
    calibration: CalibrationSettings,
    engines: Sequence[Engine],
) -> EngineComparison:
    """Calibrate and evaluate the qconfig with both engines, and compare them on the first evaluation batch."""
    task = evaluator.task
    batch, size = next(batches(task, "evaluation", evaluator.eval_batch, limit=1))
    inputs = model_inputs(task, batch)
    first, second = (_side(evaluator, requested, applied, calibration, engine, inputs) for engine in engines)
    nodes = evaluator.graph.quantized
    rows = [
        EngineRow(
            op=node.name,
            dtypes=(_dtypes(first.qconfig.ops[node.name]), _dtypes(second.qconfig.ops[node.name])),
            output=_difference(first.outputs, second.outputs, node.name, norm=True),
            scale=_difference(first.scales, second.scales, node.quantizer or ""),
            weight_scale=_difference(first.scales, second.scales, f"{node.weight}.weight"),
        )
        for node in nodes
    ]
    rows.sort(key=lambda row: (-(row.output or 0.0), -(row.scale or 0.0)))
    return EngineComparison(
        (first.name, second.name),
        task.metric_name,
        (first.metric, second.metric),
        first.samples,
        size,
        tuple(rows),
        (*first.notes, *second.notes),
    )


def _side(
    evaluator: Evaluator,
    requested: QConfig,
    applied: QConfig,
    calibration: CalibrationSettings,
    engine: Engine,
    inputs: Any,
) -> _Side:
    made = engine.quantize(evaluator, requested, applied, calibration)
    with made.running() as model:
        found = evaluate_from_start(evaluator.task, model, evaluator.eval_batch, lambda _: None)
    notes = tuple(f"{finding.op}: {finding.message}" for finding in made.findings({})) if engine.version else ()
    return _Side(
        engine.version or "qflow",
        found.metric,
        found.samples,
        made.qconfig,
        _scales(made.model),
        {name: value.clone() for name, value in made.outputs(inputs).items()},
        notes,
    )


def _scales(model: QuantizedModel) -> dict[str, Tensor]:
    """Return copies of the scales that are in use; the next engine sets them anew."""
    own = {**model.outputs, **{f"{name}.weight": q for name, q in model.weights.items()}}
    return {name: q.scale.clone().flatten() for name, q in own.items() if q.dtype and q.dtype.is_integer}


def _difference(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], name: str, norm: bool = False
) -> float | None:
    a, b = first.get(name), second.get(name)
    if a is None or b is None or a.shape != b.shape:
        return None
    a, b = a.double(), b.double()
    if norm:
        return float(torch.linalg.vector_norm(b - a) / torch.linalg.vector_norm(a).clamp_min(1e-30))
    return float(((b - a).abs() / a.clamp_min(1e-30)).max())


def _dtypes(op: OpQConfig) -> str:
    return f"{op.output or 'float32'}{f'/{op.weight}' if op.weight else ''}"
