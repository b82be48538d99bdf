"""QAT as a library call: `qflow.train` on a model of `qflow.prepare` and `qflow.calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from qflow.api.library import FakeQuantState, set_fake_quantize
from qflow.api.prepared import Prepared
from qflow.core.errors import ConfigError
from qflow.core.settings import QatSettings
from qflow.quant.trace.binding import inputs_of
from qflow.quant.train import qat
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.learned_scales import LearnedScales
from qflow.quant.train.loss import Loss
from qflow.quant.train.report import TrainingReport
from qflow.quant.train.schedule import check_schedule


class _Pairs:
    """The items of a loader as (model inputs, item)."""

    def __init__(self, prepared: Prepared, data: Iterable[Any]) -> None:
        self.prepared, self.data = prepared, data

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for item in self.data:
            yield inputs_of(self.prepared.model, self.prepared.sample, item), item


def train(
    prepared: Prepared,
    data: Iterable[Any],
    loss: Loss | None = None,
    *,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    scheduler: Callable[..., Any] | None = None,
    settings: QatSettings | None = None,
    float_model: nn.Module | None = None,
    **changes: Any,
) -> TrainingReport:
    """Train a calibrated model in place by the guide's QAT and return the record of the training.

    Items of `data` are those of `qflow.calibrate`; they are read again and again until all steps are done, unless
    `data` is an iterator. `loss(outputs, item)` returns one number; it may be left out where the float model teaches
    (`teacher={"weight": 1.0}`), and then no labels are needed. The teacher is `float_model`, by default `prepared` as
    it is now, without quantizers. `optimizer` is called with (groups, lr=...), `scheduler` with the optimizer; it is
    stepped after each step. `settings` and `changes` are fields of QatSettings:
    `qflow.train(prepared, loader, loss, steps=500, learning_rate=1e-4, rates={"head": 1e-3}, freeze=("neck",))`. The
    mode of batch norms is by default that of `set_qat_mode` when the model was prepared. Where `changes` give another
    learning rate than `settings`, the rates of single modules keep their ratio to it.

    Afterwards the model is in eval mode and quantizes (VALIDATION). Raises ConfigError for settings, losses and
    schedules that cannot work (a rate that rises, a model without trainable parameters), DataError without data,
    ModelError without calibration, DivergedError if the training diverges.
    """
    chosen = _settings(prepared, settings, changes)
    if isinstance(optimizer, torch.optim.Optimizer) or isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise ConfigError(
            "optimizer and scheduler are made by qflow.train, but got one that is made already. Give the class, or "
            "functools.partial(torch.optim.SGD, momentum=0.9)."
        )
    if prepared.cached is not None:
        raise ConfigError("QAT trains on items in any order, but got a model with state. Leave out cached_attrs.")
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    learned = LearnedScales.of(prepared, chosen, prepared.applied)
    groups = parameter_groups(prepared, chosen.rates, chosen.learning_rate, chosen.weight_decay, learned)
    schedule = scheduler if chosen.scheduled else None
    found = check_schedule(groups, optimizer, schedule, chosen.learning_rate, chosen.capped()[0])
    made = optimizer(groups, lr=chosen.learning_rate)
    report = qat.train(
        prepared, _Pairs(prepared, data), loss, made, schedule(made) if schedule else None, chosen,
        qconfig=prepared.applied, calibration=prepared.settings, learned=learned, float_model=float_model,
    )  # fmt: skip
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    hints = [chosen.unchecked] if chosen.unchecked else []
    return replace(report, findings=(*report.findings, *found, *hints))


def _settings(prepared: Prepared, settings: QatSettings | None, changes: dict[str, Any]) -> QatSettings:
    known = [f.name for f in fields(QatSettings) if f.name not in ("loss", "optimizer", "scheduler", "apply")]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ConfigError(f"qflow.train has the settings {', '.join(known)}, but got {', '.join(unknown)}.")
    given = settings or QatSettings(mode=prepared.qat_mode.value)
    if "rates" not in changes and "learning_rate" in changes:
        changes = {**changes, "rates": given.rates_at(changes["learning_rate"])}
    chosen = replace(given, **changes)
    if not chosen.steps:
        raise ConfigError("qflow.train does a number of steps, but got steps=0. Write steps=500.")
    return chosen
