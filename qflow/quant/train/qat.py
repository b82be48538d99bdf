"""Quantization-aware training: the user's loss, optimizer and scheduler on a calibrated model.

The prepared model trains with the qconfig that it was calibrated with (qat_state.py: which scales move). As the guide
advises, there is no warm-up, the learning rate is constant unless a scheduler is given, and the number of steps is
limited to a share of the float training's.

Training is deterministic, given the seed and the order of the batches, which the caller controls. For a resumed
training to continue bit for bit, a shuffling loader needs a generator of its own.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError, TrialError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.quant.train.checkpoint import load_checkpoint, random_state, restore_random, save_checkpoint
from qflow.quant.train.first_bad import first_bad
from qflow.quant.train.first_batch import RULE, FirstBatch, due, suspicious
from qflow.quant.train.interrupt import interrupts_held
from qflow.quant.train.loss import Loss, called, loss_value, runaway
from qflow.quant.train.qat_state import qat_state, train_mode

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingReport:
    """Result of a training: losses and learning rates (of the first parameter group) by step, seconds of this call."""

    steps: int
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    seconds: float
    finished: bool
    reason: str = ""
    """Why it ended before its last step; empty if it finished."""
    findings: tuple[str, ...] = ()


class DivergedError(TrialError):
    """The loss or a gradient is not finite, or the loss has become too large; the trial has failed."""

    lasting = True

    def __init__(self, message: str, step: int, first_bad_operator: str, report: TrainingReport) -> None:
        super().__init__(message)
        self.step = step
        self.first_bad_operator = first_bad_operator
        """The first bad operator, or the first parameter with a bad gradient; "" if all are finite and in range."""
        self.report = report


def train(
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
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
) -> TrainingReport:
    """Train a calibrated model in place on `batches` of (model inputs, batch); afterwards it is in eval mode.

    `loss` is called with (outputs, batch). `batches` is iterated again when it ends, unless it is an iterator. With
    `resume`, the steps in `checkpoint` are skipped, so `batches` must have the same order. `model` is called in place
    of `prepared`: its compiled or DistributedDataParallel form, which is made inside `qat_state`, because that decides
    which parameters have gradients (scales and statistics are then those of rank 0, so keep the model of rank 0). With
    `quantized` False all quantizers are off (a stage of qat_debug). Raises DivergedError, and DataError
    if there is no data.
    """
    settings = settings or QatSettings()
    with qat_state(prepared, settings, qconfig=qconfig, calibration=calibration, quantized=quantized):
        return run_steps(
            model or prepared, batches, loss, optimizer, scheduler, settings,
            prepared=prepared, on_step=on_step, checkpoint=checkpoint, resume=resume,
        )  # fmt: skip


def run_steps(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    settings: QatSettings,
    *,
    prepared: QuantizedModel | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> TrainingReport:
    """The training loop alone, for any model in its current mode (qat_debug fine-tunes the float model with it)."""
    steps, findings = settings.capped()
    for finding in findings:
        log.warning(finding)
    trainer = _Trainer(model, prepared, loss, optimizer, scheduler, settings)
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
    if steps and not trainer.step:
        raise DataError("QAT needs data, but got no batch. Check task.data.train.")
    unseen = sorted(prepared.unseen) if prepared is not None else []
    if unseen:
        findings.append(f"{len(unseen)} operators run in training only and stay float, {unseen[0]} first")
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


class _Trainer:
    """One training: its model, loss and optimizer, its progress, and one step of it."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel | None, loss: Loss, optimizer: Any, scheduler: Any,
        settings: QatSettings,
    ) -> None:  # fmt: skip
        self.model, self.prepared, self.loss, self.settings = model, prepared, loss, settings
        self.optimizer, self.scheduler = optimizer, scheduler
        self.step = 0
        self.first: FirstBatch | None = None
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.begun = time.perf_counter()
        self.calibrated = {q: float(q.scale) for q in prepared.outputs.values()} if prepared is not None else {}

    def take(self, inputs: Any, batch: Any) -> None:
        """Do one step. Raises DivergedError."""
        random = torch.get_rng_state()
        self.first = self.first or FirstBatch(inputs, batch)
        self.optimizer.zero_grad(set_to_none=True)
        value = loss_value(self._loss_of(self.model, inputs, batch))
        number = float(value.detach())
        self._refuse_runaway(number, inputs, random)
        value.backward()  # type: ignore[no-untyped-call]
        self._refuse_bad_gradients(number)
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.losses.append(number)
        self.step += 1
        if due(self.step, self.settings):
            self._refuse_ruined()

    def _loss_of(self, model: nn.Module, inputs: Any, batch: Any) -> Any:
        """What the user's loss returns for a batch."""
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self.settings.amp else nullcontext():
            return called(self.loss, call_model(model, inputs), batch)

    def _refuse_ruined(self) -> None:
        """Judge the first batch again where the last losses are all worse than the first one (first_batch.py).

        Not in distributed training, where every rank sees other losses, and all must go on alike.
        """
        if self.prepared is None or self.first is None or not suspicious(self.losses, self.settings.first_losses):
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return
        self.optimizer.zero_grad(set_to_none=True)  # so that the copy has no gradients
        again, name, what = self.first.judge(self.prepared, self._loss_of, self.losses, self.settings, self.calibrated)
        if name:
            got = f"{again:g} after {self.losses[0]:g} at step {self.step}"
            self._stop(f"{RULE}, but got {got}; the first bad operator is {name} ({what}).", name, self.step)

    def _refuse_runaway(self, number: float, inputs: Any, random: Tensor) -> None:
        rule = runaway(self.losses, number, self.settings)
        if math.isfinite(number) and not rule:
            return
        name = what = ""
        if self.prepared is not None:
            torch.set_rng_state(random)
            name, what = first_bad(self.prepared, inputs, self.calibrated, self.settings.divergence)
        rule = rule or "A loss is finite"
        where = f"the first bad operator is {name} ({what})" if name else "no operator left its range"
        self._stop(f"{rule}, but got {number:g} at step {self.step + 1}; {where}.", name)

    def _refuse_bad_gradients(self, number: float) -> None:
        named = [(n, p) for n, p in self.model.named_parameters() if p.grad is not None]
        limit = self.settings.clip_gradients
        total = torch.nn.utils.clip_grad_norm_([p for _, p in named], math.inf if limit is None else limit)
        if not bool(torch.isfinite(total)):
            bad = next((n for n, p in named if not bool(torch.isfinite(p.grad).all())), "")  # type: ignore[arg-type]
            bad = bad.removeprefix("module.").removeprefix("model.") if self.prepared is not None else bad
            where = f"the first is that of {bad}" if bad else "their norm overflows"
            self._stop(
                f"Gradients are finite, but got NaN or inf at step {self.step + 1} (loss {number:g}); {where}.", bad
            )

    def _stop(self, message: str, first_bad_operator: str, step: int | None = None) -> None:
        report = self.report(False, message)
        advice = "Lower qat.learning_rate, or see qat_debug."
        if not self.step and not first_bad_operator:  # before the first step no rate matters
            advice = "See what qat.loss returns for the first batch."
        raise DivergedError(f"{message} {advice}", step or self.step + 1, first_bad_operator, report)

    def report(self, finished: bool, reason: str = "", findings: Iterable[str] = ()) -> TrainingReport:
        """The report of the steps done so far."""
        seconds = time.perf_counter() - self.begun
        return TrainingReport(
            self.step, tuple(self.losses), tuple(self.rates), seconds, finished, reason, tuple(findings)
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint with everything that the remaining steps depend on."""
        save_checkpoint(path, self._state(), self.prepared or self.model)

    def resume(self, path: Path, stream: Iterator[Any]) -> None:
        """Restore tensors, counters and random states from `path`, and skip as many batches as it has steps."""
        state = load_checkpoint(path, self.prepared or self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.losses, self.rates = state["step"], state["losses"], state["rates"]
        for _ in range(self.step):
            pair = next(stream, None)
            if self.first is None and pair is not None:
                self.first = FirstBatch(*pair)
        restore_random(state["random"])  # last, because the skipped batches use random numbers too

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "losses": self.losses,
            "rates": self.rates,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "random": random_state(),
        }
