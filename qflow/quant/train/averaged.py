"""An exponential moving average of the weights during training (Polyak averaging), which takes their place at its end.

    average += (1 - d) * (weight - average)      d = min(decay, (1 + step) / (10 + step))

The smaller decay of the first steps lets a short training forget its start. Batch norm statistics and learned scales
are averaged alike; calibrated and moving activation scales are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Averaged:
    """The averages of the trained tensors of `model` and of `others`."""

    def __init__(self, model: nn.Module, decay: float, others: Sequence[Tensor] = ()) -> None:
        buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.tensors = [*(p for p in model.parameters() if p.requires_grad), *buffers, *others]
        self.decay, self.steps = decay, 0
        self.averages = [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Take the present tensors in, after a step of the optimizer."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        for average, tensor in zip(self.averages, self.tensors, strict=True):
            average.lerp_(tensor.detach(), 1.0 - decay)

    @torch.no_grad()
    def put(self) -> None:
        """Write the averages into the model."""
        for average, tensor in zip(self.averages, self.tensors, strict=True):
            tensor.copy_(average)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them."""
        return {"steps": self.steps, "averages": self.averages}

    def restore(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.steps = int(state["steps"])
        for average, known in zip(self.averages, state["averages"], strict=True):
            average.copy_(known)
