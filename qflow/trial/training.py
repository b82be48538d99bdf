"""QAT of one trial: the user's loss, optimizer and scheduler on a copy of the calibrated model.

Batches come from `task.data.train`, shuffled by `qat.seed`, so that a trial can be rebuilt from its run alone. Where
the float model alone teaches, no labels are read, and data without a train split train on `task.data.calibration`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from qflow.core.errors import ConfigError, DataError, TrialError
from qflow.core.qconfig import QConfig
from qflow.core.record import digest
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.model_state import forward_state
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.checkpoint import read_checkpoint
from qflow.quant.train.groups import parameter_groups
from qflow.quant.train.learned_scales import LearnedScales
from qflow.quant.train.qat import train
from qflow.quant.train.qat_state import require_trainable
from qflow.quant.train.report import TrainingReport
from qflow.quant.train.schedule import check_schedule
from qflow.quant.train.teacher import require_features
from qflow.tasks.loading import loaded
from qflow.tasks.task import Task, model_inputs, split_for

NO_TRAIN_SPLIT = "the float model teaches on the calibration data: there is no train split"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """The user's `loss(outputs, batch)`, and the functions that make optimizer and scheduler."""

    loss: Callable[[Any, Any], Tensor] | None
    """None where the teacher's loss is the only one."""
    optimizer: Callable[..., torch.optim.Optimizer]
    scheduler: Callable[..., Any] | None = None


def train_split(task: Task, settings: QatSettings, labels: bool = True) -> str:
    """Return the split that a training reads; that of calibration where there is no train split and labels are none."""
    split = split_for(task, "train", settings.augment)
    return split if labels or getattr(task.data, split, None) is not None else "calibration"


class TrainBatches:
    """Iterates over (model inputs, batch) of the training split, in an order that `qat.seed` decides.

    Without `labels` (the float model is the only teacher), data without a train split train on that of calibration.
    """

    def __init__(self, task: Task, settings: QatSettings, labels: bool = True) -> None:
        if task.cached_attrs:
            raise ConfigError(
                "QAT trains on single samples in random order, but got a model with state, task.cached_attrs="
                f"{list(task.cached_attrs)}. Use qat=none."
            )
        self.split, batch_size = train_split(task, settings, labels), settings.batch_size
        data = getattr(task.data, self.split, None)
        if data is None or len(data) < batch_size:
            have = "none" if data is None else f"{len(data)} samples"
            raise DataError(
                f"QAT needs task.data.{self.split} with at least one batch of {batch_size}, but got {have}. "
                f"{'Give the data a train split, or lower' if labels else 'Lower'} qat.batch_size."
            )
        self.findings = (NO_TRAIN_SPLIT,) if self.split == "calibration" else ()
        self.task = task
        generator = torch.Generator().manual_seed(settings.seed)
        collate = getattr(task.data, "collate", None)
        self.loader = DataLoader(
            data, batch_size, shuffle=True, drop_last=True, generator=generator, collate_fn=collate
        )

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        device = self.task.device
        for batch in loaded(self.loader, self.split):
            moved = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, batch)
            yield model_inputs(self.task, moved), moved


def train_trial(
    task: Task,
    prepared: QuantizedModel,
    training: Training | None,
    settings: QatSettings,
    qconfig: QConfig,
    calibration: CalibrationSettings,
    checkpoints: Path | None = None,
    float_model: nn.Module | None = None,
) -> tuple[QuantizedModel, TrainingReport]:
    """Train a copy of `prepared`, calibrated with `qconfig`, for `settings.steps`. Raises DivergedError, DataError.

    `float_model` has the weights that `prepared` starts from; None if these are the task's own. It teaches features,
    which a repair may have rescaled; outputs are taught by the task's model.
    `checkpoints` is a folder for this task, loss, optimizer and training data. If it holds a shorter or interrupted
    training that differs in its steps only, the longest one is continued: no step is trained twice, and the result is
    the same, bit for bit, as that of an uninterrupted training.
    """
    if training is None:
        raise ConfigError("QAT needs a loss, but got none. Set qat.loss._target_ to a function of (outputs, batch).")
    trained = copy.deepcopy(prepared)
    learned = LearnedScales.of(trained, settings, qconfig)
    groups = parameter_groups(trained, settings.rates, settings.learning_rate, settings.weight_decay, learned)
    optimizer = training.optimizer(groups, lr=settings.learning_rate)
    scheduler = training.scheduler(optimizer) if training.scheduler is not None and settings.scheduled else None
    schedule = training.scheduler if settings.scheduled else None
    found = check_schedule(groups, training.optimizer, schedule, settings.learning_rate, settings.capped()[0])
    batches = TrainBatches(task, settings, training.loss is not None)
    place = None
    if checkpoints is not None:
        name = digest(training_key(trained, training, settings, qconfig, calibration))
        place = _checkpoint(checkpoints, name, settings.steps)
    report = train(
        trained, batches, training.loss, optimizer, scheduler, settings,
        qconfig=qconfig, calibration=calibration, checkpoint=place, resume=place is not None,
        learned=learned, float_model=(settings.teacher.features and float_model) or task.model,
    )  # fmt: skip
    return trained, replace(report, findings=(*report.findings, *found, *batches.findings))


def check_training(task: Task, training: Training, settings: QatSettings) -> None:
    """Raise ConfigError or DataError for a training that cannot run: its parameters, rates, optimizer or data."""
    require_trainable(task.model)
    require_trainable(task.model, settings.freeze)
    if settings.teacher.weight:
        require_features(task.model, settings.teacher.features)
    groups = parameter_groups(task.model, settings.rates, settings.learning_rate, settings.weight_decay)
    schedule = training.scheduler if settings.scheduled else None
    check_schedule(groups, training.optimizer, schedule, settings.learning_rate, settings.capped()[0])
    TrainBatches(task, settings, training.loss is not None)


def training_key(
    prepared: QuantizedModel,
    training: Training | None,
    settings: QatSettings,
    qconfig: QConfig,
    calibration: CalibrationSettings,
) -> dict[str, Any]:
    """Return everything that decides the result of a training, apart from task, loss, optimizer, data and steps.

    `prepared` is calibrated. Without a scheduler, `settings.scheduled` makes no difference and is ignored. A rate that
    decays depends on the number of steps from the first one on, so that number is a part of the key then.
    """
    scheduled = settings.scheduled and training is not None and training.scheduler is not None
    decays = settings.cosine_decay and not scheduled
    decides = replace(
        settings, steps=settings.capped()[0] if decays else 0, apply="every_trial", checkpoint_every=0,
        scheduled=scheduled, cosine_decay=decays,
    )  # fmt: skip
    moving = [calibration.int16_margin, calibration.divisor]  # the settings that moving scales depend on
    return {"qat": decides.decisive(), "qconfig": qconfig.digest, "start": forward_state(prepared), "moving": moving}


def _checkpoint(folder: Path, name: str, steps: int) -> Path:
    """Return the checkpoint file of a training; the file of the longest shorter training is renamed to it."""
    place = folder / f"{name}-{steps}.safetensors"
    shorter = {int(p.stem.split("-")[1]): p for p in folder.glob(f"{name}-*.safetensors")}
    known = [taken for taken in shorter if taken < steps]
    if not place.exists() and known:
        with suppress(FileNotFoundError):  # another study in this root has renamed it
            shorter[max(known)].rename(place)
    if place.exists():
        try:
            read_checkpoint(place)
        except TrialError:
            _log.warning(f"training {place.name} is damaged and starts over")
            place.unlink()
    return place


def float_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by the float model's own names, as copies on the CPU."""
    inner = model.model if isinstance(model, QuantizedModel) else model
    return {name: tensor.detach().cpu().clone() for name, tensor in inner.state_dict().items()}
