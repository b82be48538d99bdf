"""Divergence that the losses alone do not show: the first batch once more, with the parameters of a later step.

Only the first loss of a training is one of untrained parameters. A rate that is much too high ruins the model in the
first steps, so the other first losses are no measure, and one number does not tell noise from divergence. The same
batch with the same random numbers has no noise. A training has diverged if its loss there has risen and an operator has
left its calibrated range or is zero everywhere. That needs no scale and no sign of the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.settings import QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.checkpoint import random_state, restore_random
from qflow.quant.train.first_bad import first_bad
from qflow.quant.values.fake_quant import FakeQuant

RULE = "A loss does not rise on the first batch while an operator leaves its calibrated range"


@dataclass(frozen=True)
class FirstBatch:
    """The first batch of a training, and the state of the random generators after it was read."""

    inputs: Any
    batch: Any
    random: dict[str, Any] = field(default_factory=random_state)

    @torch.no_grad()
    def judge(
        self,
        prepared: QuantizedModel,
        loss_of: Callable[[nn.Module, Any, Any], Tensor],
        losses: Sequence[float],
        settings: QatSettings,
        calibrated: Mapping[FakeQuant, float],
    ) -> tuple[float, str, str]:
        """Return (loss on this batch now, operator, reason) if the training has diverged, else (.., "", "").

        `calibrated` holds the scales before training. `prepared`, which is in train mode, stays as it is: a copy runs.
        """
        before = random_state()
        trial = copy.deepcopy(prepared)
        try:
            restore_random(self.random)
            again = float(loss_of(trial, self.inputs, self.batch))
            if not risen(losses, again, settings.first_losses):
                return again, "", ""
            restore_random(self.random)
            start = {trial.outputs[name]: calibrated[q] for name, q in prepared.outputs.items()}
            return again, *first_bad(trial, self.inputs, start, settings.divergence)
        finally:
            restore_random(before)


def due(step: int, settings: QatSettings) -> bool:
    """Return whether the first batch is judged after `step` steps: at the last one, and ever more rarely before it.

    The first time is when `first_losses` losses of changed parameters are known, then after twice as many, and so on.
    """
    rounds, rest = divmod(step - 1, settings.first_losses)
    return step == settings.capped()[0] or (rest == 0 and rounds > 0 and rounds & (rounds - 1) == 0)


def suspicious(losses: Sequence[float], count: int) -> bool:
    """Return whether each of the last `count` losses, without the first one of all, is worse than that first one."""
    recent = losses[max(len(losses) - count, 1) :]
    return bool(recent) and min(recent) > losses[0]


def risen(losses: Sequence[float], again: float, count: int) -> bool:
    """Return whether the first batch, whose loss was `losses[0]`, is clearly worse at `again`.

    It has risen by more than the last `count` losses differ, or by more than its own size.
    """
    recent = losses[max(len(losses) - count, 1) :]
    least = min(max(recent) - min(recent), abs(losses[0]))
    return not math.isfinite(again) or again - losses[0] > least
