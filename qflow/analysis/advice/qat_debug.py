"""The guide's order of looking when QAT fails: what is at fault, the pipeline, the model or the quantizers?

    1  fine-tune the float model with the same pipeline         bad: the pipeline, or overfitting
    2  the prepared model with fake quantization off            bad: preparing, or the batch norm mode
    3  rate 0, scales and statistics kept                       must be the calibrated metric, exactly
    4  rate 0 as configured                                     what moving scales and statistics do alone
    5  QAT as configured                                        bad: rate, decay, augmentation

Each stage starts from copies of the same models, sees the same batches, and is judged on the same metric. A stage is
at fault that loses more than the tolerance against its reference (stage 3: anything at all). Whether the goal is met
is another question: sound training may still end too far below float, and then the verdict says by how much.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qflow.core.errors import TrialError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.qat import Loss, parameter_groups, run_steps, train

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class DebugStage:
    """One training of the debug order."""

    name: str
    metric: float | None
    """None where the training stopped; `note` says why."""
    reference: float
    """What the metric is laid to."""
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class QatDebug:
    """All stages and what follows from them."""

    float_metric: float
    calibrated_metric: float
    stages: tuple[DebugStage, ...]
    verdict: str
    tolerance: float
    """What a stage may lose against its reference, in the metric's units."""


FAULTS = {
    "": "No stage is at fault: none loses more than the tolerance.",
    "float fine-tune": "The pipeline is at fault (data, loss, rate) or the model overfits: float training loses too.",
    "fake quant off": "Preparing the model or the batch norm mode is at fault: it loses without any quantizer.",
    "rate 0": "The calibrated state is not what is trained: another checkpoint, qconfig or preprocessing.",
    "rate 0, moving": "Moving scales or batch norm statistics are at fault: set qat.moving=false or qat.mode=fuse_bn.",
    "qat": "The training is at fault, what is before it is sound: tune rate, decay, weight decay and augmentation.",
}


def qat_debug(
    model: nn.Module,
    prepared: QuantizedModel,
    batches: Callable[[], Iterable[tuple[Any, Any]]],
    loss: Loss,
    build: Build,
    evaluate: Evaluate,
    settings: QatSettings,
    *,
    qconfig: QConfig | None = None,
    calibration: CalibrationSettings | None = None,
    tolerance: float = 0.005,
    goal: float | None = None,
    maximize: bool = True,
) -> QatDebug:
    """Run the five stages and name the first at fault. `model` and `prepared` (calibrated) are left as they are.

    `batches()` gives (model inputs, batch) in the same order each time; `build` makes an optimizer of parameter
    groups; a stage passes that loses at most `tolerance` in the metric's units (stage 3: nothing but rounding). `goal`
    is the largest loss against float that would do; the verdict says whether QAT gets there.
    """
    float_metric = evaluate(model)
    with prepared.quantized():
        calibrated = evaluate(prepared)
    sign = 1.0 if maximize else -1.0
    parts = (batches, loss, build, evaluate)

    def stage(name: str, run: Callable[[], float], reference: float, allowed: float) -> DebugStage:
        return _stage(name, run, reference, allowed, sign)

    def quantized(changed: QatSettings, on: bool = True) -> Callable[[], float]:
        return lambda: _train_prepared(copy.deepcopy(prepared), changed, parts, on, qconfig, calibration)

    still = replace(settings, learning_rate=0.0, rates={}, moving=False, mode="fuse_bn", moving_weights=False)
    moving = replace(settings, learning_rate=0.0, rates={})
    tuned = stage(
        "float fine-tune", lambda: _train_float(copy.deepcopy(model), settings, parts), float_metric, tolerance
    )
    stages = (
        tuned,
        stage("fake quant off", quantized(settings, on=False), tuned.metric or float_metric, tolerance),
        _exact(stage("rate 0", quantized(still), calibrated, 0.0), calibrated),
        stage("rate 0, moving", quantized(moving), calibrated, tolerance),
        stage("qat", quantized(settings), calibrated, tolerance),
    )
    failed = next((s.name for s in stages if not s.passed), "")
    verdict = f"{FAULTS[failed]}{_goal(stages[-1].metric, float_metric, sign, goal)}"
    return QatDebug(float_metric, calibrated, stages, verdict, tolerance)


def _stage(name: str, run: Callable[[], float], reference: float, allowed: float, sign: float) -> DebugStage:
    """One stage, run: it passes where its metric lies at most `allowed` below `reference` (above, with sign -1)."""
    try:
        metric = run()
    except TrialError as error:
        return DebugStage(name, None, reference, False, str(error))
    loses = sign * (reference - metric)
    return DebugStage(name, metric, reference, loses <= allowed, f"loses {loses:.4g}" if loses > 0 else "")


def _goal(metric: float | None, float_metric: float, sign: float, goal: float | None) -> str:
    """Where QAT ends against the goal; empty without either."""
    if metric is None or goal is None:
        return ""
    drop = sign * (float_metric - metric)
    if drop <= goal:
        return f" QAT ends {max(drop, 0.0):.4g} below float: the goal of {goal:g} is met."
    return (
        f" QAT ends {drop:.4g} below float: the goal of {goal:g} is missed. Give it more steps or another rate, "
        "or raise the most sensitive operators to int16 first."
    )


def _exact(stage: DebugStage, reference: float) -> DebugStage:
    """Better than calibration is as wrong as worse: nothing was trained."""
    return replace(stage, passed=stage.metric is not None and abs(stage.metric - reference) <= 1e-9)


def _train_float(model: nn.Module, settings: QatSettings, parts: Any) -> float:
    batches, loss, build, evaluate = parts
    groups = parameter_groups(model, settings.rates, settings.learning_rate, settings.weight_decay)
    run_steps(model.train(), batches(), loss, build(groups), None, settings)
    return float(evaluate(model.eval()))


def _train_prepared(
    prepared: QuantizedModel, settings: QatSettings, parts: Any, on: bool, qconfig: Any, calibration: Any
) -> float:
    batches, loss, build, evaluate = parts
    groups = parameter_groups(prepared, settings.rates, settings.learning_rate, settings.weight_decay)
    train(
        prepared, batches(), loss, build(groups), None, settings,
        qconfig=qconfig, calibration=calibration, quantized=on,
    )  # fmt: skip
    if not on:
        return float(evaluate(prepared))
    with prepared.quantized():
        return float(evaluate(prepared))
