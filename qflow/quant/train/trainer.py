"""One training: its progress, one step of it, and its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.settings import QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.quant.train.averaged import Averaged
from qflow.quant.train.checkpoint import load_checkpoint, random_state, restore_random, save_checkpoint
from qflow.quant.train.first_bad import first_bad
from qflow.quant.train.first_batch import RULE, FirstBatch, due, suspicious
from qflow.quant.train.learned_scales import LearnedScales
from qflow.quant.train.loss import loss_value, runaway
from qflow.quant.train.objective import Objective
from qflow.quant.train.report import DivergedError, TrainingReport


class Trainer:
    """One training: its model, loss and optimizer, its progress, and one step of it."""

    def __init__(
        self, model: nn.Module, prepared: QuantizedModel | None, objective: Objective, optimizer: Any, scheduler: Any,
        settings: QatSettings, learned: LearnedScales | None = None,
    ) -> None:  # fmt: skip
        self.model, self.prepared, self.objective, self.settings = model, prepared, objective, settings
        self.optimizer, self.scheduler, self.learned = optimizer, scheduler, learned
        others = [learned.logarithms] if learned is not None else []
        inner = prepared.model if prepared is not None else model
        self.averaged = Averaged(inner, settings.ema, others) if settings.ema else None
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
        with self.learned.step() if self.learned is not None else nullcontext():
            value = loss_value(self._loss_of(self.model, inputs, batch))
            number = float(value.detach())
            self._refuse_runaway(number, inputs, random)
            value.backward()  # type: ignore[no-untyped-call]
        self._refuse_bad_gradients(number)
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self.optimizer.step()
        if self.learned is not None:
            self.learned.write()
        if self.averaged is not None:
            self.averaged.update()
        if self.scheduler is not None:
            self.scheduler.step()
        self.losses.append(number)
        self.step += 1
        if due(self.step, self.settings):
            self._refuse_ruined()

    def _loss_of(self, model: nn.Module, inputs: Any, batch: Any) -> Any:
        """The objective of a batch, as the user's loss returns it."""
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16) if self.settings.amp else nullcontext():
            return self.objective(model, inputs, batch)

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
        bad = self.learned.first_bad() if self.learned is not None else ""
        if bad or not bool(torch.isfinite(total)):
            bad = bad or next((n for n, p in named if not bool(torch.isfinite(p.grad).all())), "")  # type: ignore[arg-type]
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

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averages in place of the last weights and scales; without them all stays."""
        if self.averaged is None or not self.step:
            return
        self.averaged.put()
        if self.learned is not None:
            self.learned.write()
        if self.prepared is not None and self.first is not None and self.prepared.plan.weights_at:
            self.prepared.eval()  # so that only the scales of weights of functionals follow
            call_model(self.prepared, self.first.inputs)

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
        if self.learned is not None:
            self.learned.restore(state["learned"])
        if self.averaged is not None:
            self.averaged.restore(state["averaged"])
        restore_random(state["random"])  # last, because the skipped batches use random numbers too

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "losses": self.losses,
            "rates": self.rates,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "random": random_state(),
            "learned": self.learned.state() if self.learned is not None else None,
            "averaged": self.averaged.state() if self.averaged is not None else None,
        }
