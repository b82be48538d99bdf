"""Quantization-aware training: the user's loss, optimizer and scheduler on a calibrated model.

The prepared model trains with the qconfig that it was calibrated with (qat_state.py: which scales move). As the guide
advises, there is no warm-up, the learning rate is constant unless a scheduler is given (or the rate is to decay), and
the number of steps is limited to a share of the float training's.

Training is deterministic, given the seed and the order of the batches, which the caller controls. For a resumed
training to continue bit for bit, a shuffling loader needs a generator of its own.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.interrupt import interrupts_held
from qflow.quant.train.learned_scales import LearnedScales
from qflow.quant.train.loss import Loss
from qflow.quant.train.objective import Objective
from qflow.quant.train.qat_state import qat_state, train_mode
from qflow.quant.train.report import TrainingReport
from qflow.quant.train.teacher import Teacher
from qflow.quant.train.trainer import Trainer

NONE_LEARNED = "qat.learned_scales learns none: no activation is int8 with a scale that is free to change"
log = logging.getLogger(__name__)


def train(
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    settings: QatSettings | None = None,
    *,
    qconfig: QConfig | None = None,
    calibration: CalibrationSettings | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    checkpoint: Path | None = None,
    resume: bool = False,
    model: nn.Module | None = None,
    quantized: bool = True,
    learned: LearnedScales | None = None,
    float_model: nn.Module | None = None,
) -> TrainingReport:
    """Train a calibrated model in place on `batches` of (model inputs, batch); afterwards it is in eval mode.

    `loss` is called with (outputs, batch); None where `settings.teacher` alone is the loss: that teacher is
    `float_model`, by default the model as it is now, without quantizers. `learned` are scales whose group `optimizer`
    has. `batches` is iterated again when it ends, unless it is an iterator. With `resume`, the steps in `checkpoint`
    are skipped, so `batches` must have the same order. `model` is called in place of `prepared`: its compiled or
    DistributedDataParallel form, which is made inside `qat_state`, because that decides which parameters have gradients
    (scales and statistics are then those of rank 0, so keep the model of rank 0). With `quantized` False all quantizers
    are off (a stage of qat_debug). Raises DivergedError, and DataError if there is no data.
    """
    settings = settings or QatSettings()
    teacher = None
    if settings.teacher.weight:
        teacher = Teacher(copy.deepcopy(prepared).model if float_model is None else float_model, settings.teacher)
    objective = Objective(loss, settings, teacher, prepared)
    with qat_state(prepared, settings, qconfig=qconfig, calibration=calibration, quantized=quantized):
        report = run_steps(
            model or prepared, batches, objective, optimizer, scheduler, settings,
            prepared=prepared, on_step=on_step, checkpoint=checkpoint, resume=resume, learned=learned,
        )  # fmt: skip
    unlearned = (NONE_LEARNED,) if settings.learned_scales and learned is None and quantized else ()
    return replace(report, findings=(*report.findings, *unlearned))


def run_steps(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    settings: QatSettings,
    *,
    prepared: QuantizedModel | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    checkpoint: Path | None = None,
    resume: bool = False,
    learned: LearnedScales | None = None,
) -> TrainingReport:
    """The training loop alone, for any model in its current mode (qat_debug fine-tunes the float model with it)."""
    steps, findings = settings.capped()
    for finding in findings:
        log.warning(finding)
    if scheduler is None and settings.cosine_decay and steps:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(model, prepared, objective, optimizer, scheduler, settings, learned)
    _refuse_amp(prepared, settings)
    reason = ""
    with interrupts_held() as held, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(settings.seed)
        stream = _stream(batches)
        if resume and checkpoint is not None and checkpoint.exists():
            trainer.resume(checkpoint, stream)
        while trainer.step < steps and not held.is_set():
            if (pair := next(stream, None)) is None:
                reason = f"the data ended after {trainer.step} of {steps} steps"
                break
            trainer.take(*pair)
            on_step(trainer.step, trainer.losses[-1])
            if prepared is not None and not prepared.training:  # on_step has evaluated
                train_mode(prepared, settings)
            every = settings.checkpoint_every or steps
            if checkpoint is not None and (trainer.step == steps or trainer.step % every == 0 or held.is_set()):
                trainer.save(checkpoint)
        trainer.finish()
    if steps and not trainer.step:
        raise DataError("QAT needs data, but got no batch. Check task.data.train.")
    unseen = sorted(prepared.unseen) if prepared is not None else []
    if unseen:
        findings.append(f"{len(unseen)} operators run in training only and stay float, {unseen[0]} first")
    findings += objective.teacher.findings if objective.teacher is not None else ()
    return trainer.report(not reason, reason, findings)


def _stream(batches: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
    while True:
        empty = True
        for pair in batches:
            empty = False
            yield pair
        if empty or iter(batches) is batches:  # an iterator can be consumed only once
            return


def _refuse_amp(prepared: QuantizedModel | None, settings: QatSettings) -> None:
    nodes = prepared.graph.quantized if prepared is not None else ()  # norms and softmaxes compute in float32 inside
    int16 = [n.name for n in nodes if prepared.outputs[n.quantizer or ""].dtype == QDtype.qint16]  # type: ignore[union-attr]
    if settings.amp and int16:
        raise ConfigError(
            f"qat.amp is for int8 alone (bfloat16 has 8 bits), but got {len(int16)} int16 operators, {int16[0]} first. "
            "Set qat.amp=false."
        )
