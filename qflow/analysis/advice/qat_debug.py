"""The guide's five stages for a QAT that fails: they find whether the pipeline, the model or the quantizers fail.

    1  fine-tune the float model with the same pipeline         if it loses: the pipeline, or overfitting
    2  the prepared model with fake quantization off            if it loses: the preparation, or the batch norm mode
    3  rate 0, scales and statistics kept                       must give the calibrated metric exactly
    4  rate 0 as configured                                     shows what moving scales and statistics do alone
    5  QAT as configured                                        if it loses: rate, decay or augmentation

Each stage starts from copies of the same models, sees the same batches, and is judged on the same metric. A stage
is at fault if its metric is worse than its reference by more than the tolerance; stage 3 is at fault if the two differ
by more than rounding. The goal is checked apart from this: a training without fault may still end too far below float,
and then the verdict says by how much.
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
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.learned_scales import LearnedScales
from qflow.quant.train.loss import Loss
from qflow.quant.train.objective import Objective
from qflow.quant.train.qat import run_steps, train
from qflow.quant.train.teacher import Teacher

Build = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class DebugStage:
    """One stage: a training and its metric."""

    name: str
    metric: float | None
    """None where the training stopped; `note` says why."""
    reference: float
    """The metric that this one is compared with."""
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
    loss: Loss | None,
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
    groups. A stage passes if it loses at most `tolerance`, in the metric's units (stage 3: only rounding). `goal` is
    the largest accepted drop from float; the verdict says whether QAT meets it.
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
    """Run one stage: it passes where its metric lies at most `allowed` below `reference` (above, with sign -1)."""
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
    """`stage`, passed only if its metric equals `reference`: nothing was trained, so that a better one is wrong too."""
    return replace(stage, passed=stage.metric is not None and abs(stage.metric - reference) <= 1e-9)


def _train_float(model: nn.Module, settings: QatSettings, parts: Any) -> float:
    batches, loss, build, evaluate = parts
    groups = parameter_groups(model, settings.rates, settings.learning_rate, settings.weight_decay)
    teacher = Teacher(copy.deepcopy(model), settings.teacher) if settings.teacher.weight else None
    run_steps(model.train(), batches(), Objective(loss, settings, teacher, None), build(groups), None, settings)
    return float(evaluate(model.eval()))


def _train_prepared(
    prepared: QuantizedModel, settings: QatSettings, parts: Any, on: bool, qconfig: Any, calibration: Any
) -> float:
    batches, loss, build, evaluate = parts
    learned = LearnedScales.of(prepared, settings, qconfig) if on else None
    groups = parameter_groups(prepared, settings.rates, settings.learning_rate, settings.weight_decay, learned)
    train(
        prepared, batches(), loss, build(groups), None, settings,
        qconfig=qconfig, calibration=calibration, quantized=on, learned=learned,
    )  # fmt: skip
    if not on:
        return float(evaluate(prepared))
    with prepared.quantized():
        return float(evaluate(prepared))
