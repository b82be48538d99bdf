"""The float weights of trials: those of the user's model, or repaired ones, which are computed once for all trials.

A repair is a function of its settings, the model, the first calibration samples and the grid of the device. It does not
depend on the qconfig or the calibration of a trial: all operators are at int8, with scales of least squared error. So
trials that differ in these share it, and a trial can be rebuilt from its own configuration.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.qconfig import QConfig
from qflow.core.repair_settings import FEWEST, RepairSettings
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.repair.base.contract import RepairTable
from qflow.repair.calibration.observers import held_by_user, observed
from qflow.repair.run import repair
from qflow.repair.steps import steps_of
from qflow.tasks.content_digest import bytes_of
from qflow.tasks.task import Task, batches, model_inputs

DIGEST_CHARS = 16
MEMORY = 2 << 30
"""Bytes of model inputs that a repair holds; with larger samples it reads fewer."""


@dataclass(frozen=True)
class Repaired:
    """What a repair gave: the tensors that it changed, and the table of what was tried."""

    weights: Mapping[str, Tensor]
    """Changed parameters and buffers by the float model's own names, on the CPU."""
    table: RepairTable
    observers: Mapping[str, str] = field(default_factory=dict)
    """Operator -> calibration method of its int8 output, where it is not that of the trial."""

    @cached_property
    def digest(self) -> str:
        """Digest of the changed tensors; empty if nothing was changed."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.weights.items()):
            sha.update(name.encode())
            sha.update(bytes_of(tensor))
        return sha.hexdigest()[:DIGEST_CHARS] if self.weights else ""

    @property
    def changed(self) -> bool:
        """Whether the repair changed anything."""
        return bool(self.weights or self.observers)

    def observed(self, qconfig: QConfig) -> QConfig:
        """Return `qconfig` with the chosen methods, for int8 outputs for which the user has set nothing."""
        chosen = {name: qconfig.ops[name] for name in self.observers if name in qconfig.ops}
        free = {name: op for name, op in chosen.items() if op.output == QDtype.qint8 and not held_by_user(op)}
        return qconfig.with_ops({name: observed(op, self.observers[name]) for name, op in free.items()})


def repaired(
    task: Task,
    prepared: QuantizedModel,
    settings: RepairSettings,
    calibration: CalibrationSettings,
    qconfig: QConfig,
    also: Sequence[QConfig],
) -> Repaired:
    """Repair a copy of `prepared`, which has the user's weights, at `qconfig`; see `repair` for `also`.

    Only the divisor of `calibration` is used, because the grid of the weights depends on it. A model or data that no
    repair takes give a table that says so.
    """
    steps = settings.steps
    grid = CalibrationSettings(divisor=calibration.divisor, batch_size=settings.batch_size)
    try:
        given = [] if task.cached_attrs else _first_samples(task, settings)
        model, context, table = repair(prepared, given, qconfig, grid, steps_of(steps), also)
    except (ConfigError, DataError) as error:
        return Repaired({}, RepairTable.refused(steps, str(error)))
    before, after = prepared.float_state_dict(), model.float_state_dict()
    tensors = {name: t for name, t in after.items() if isinstance(t, Tensor)}  # else the extra state of a user's module
    weights = {name: t.detach().cpu().clone() for name, t in tensors.items() if not torch.equal(t, before[name])}
    present, chosen = ({name: op.observer for name, op in q.ops.items()} for q in (qconfig, context.qconfig))
    methods = {name: method for name, method in chosen.items() if method and method != present[name]}
    return Repaired(weights, table, methods)


def _first_samples(task: Task, settings: RepairSettings) -> list[tuple[Any, int]]:
    """Return the model inputs of the first calibration samples, as many as `settings` ask for or `MEMORY` holds."""
    first = range(min(settings.samples, len(task.data.calibration)))
    found: list[tuple[Any, int]] = []
    held = 0
    for batch, size in batches(task, "calibration", settings.batch_size, indices=first):
        inputs = model_inputs(task, batch)
        held += sum(t.numel() * t.element_size() for t in tree_leaves(inputs) if isinstance(t, Tensor))
        if held > MEMORY and sum(count for _, count in found) >= FEWEST:
            break
        found.append((inputs, size))
    return found


class FloatWeights:
    """The float weights that a prepared model has at present: the user's own, or repaired ones."""

    def __init__(self, model: nn.Module, prepared: QuantizedModel) -> None:
        self._user, self._prepared = model, prepared
        self._now: Repaired | None = None
        self._model: tuple[str, nn.Module] = ("", model)

    @property
    def digest(self) -> str:
        """Digest of what a repair has changed in the present weights; empty for the user's own."""
        return self._now.digest if self._now else ""

    @property
    def now(self) -> Repaired | None:
        """The repair whose weights the prepared model has; None for the user's own."""
        return self._now

    def use(self, found: Repaired | None) -> None:
        """Give the prepared model these weights. If they are others, it must be calibrated again."""
        if (found.digest if found else "") != self.digest:
            self._prepared.load_float_state_dict({**self._user.state_dict(), **(found.weights if found else {})})
        self._now = found

    @property
    def model(self) -> nn.Module:
        """The float model with the present weights; the user's own model if they are its own."""
        if not self.digest:
            return self._user
        if self._model[0] != self.digest:
            model = copy.deepcopy(self._user)
            assert self._now is not None
            model.load_state_dict({**self._user.state_dict(), **self._now.weights})
            self._model = (self.digest, model)
        return self._model[1]
