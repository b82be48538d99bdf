"""Train a built-in task's float model and save its weights.

    python -m workflows.train_float

Plain supervised training: AdamW, and a learning rate that rises for a tenth of the steps and falls by a
cosine to nothing. Repeatable for a given seed and thread count.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from qflow.tasks.perception.data import build_data
from qflow.tasks.perception.metric import Found, loss
from qflow.tasks.perception.model import WEIGHTS, build_model

log = logging.getLogger(__name__)


class Data(Protocol):
    """What training needs of a task's data; a train split with `set_epoch` is told each epoch's number."""

    @property
    def train(self) -> Dataset[Any]:
        """What the weights are fitted to."""

    @property
    def evaluation(self) -> Dataset[Any]:
        """What they are measured on at the end."""


def train(
    model: nn.Module,
    data: Data,
    loss: Callable[[Any, Any], Tensor],
    metric: Callable[[Any, Any], Tensor],
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
) -> None:
    """Train `model` in place and leave it in eval mode."""
    torch.manual_seed(seed)
    loader = DataLoader(data.train, batch_size, shuffle=True, drop_last=True)
    steps = epochs * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        begin, total = time.monotonic(), 0.0
        if hasattr(data.train, "set_epoch"):
            data.train.set_epoch(epoch)
        model.train()
        for batch in loader:
            value = loss(model(batch[0]), batch)
            optimizer.zero_grad()
            torch.autograd.backward(value)
            optimizer.step()
            schedule.step()
            total += value.item()
        seconds = time.monotonic() - begin
        log.info("epoch %d/%d: loss %.4f, %.0f s", epoch + 1, epochs, total / len(loader), seconds)
    log.info("metric %.4f", evaluate(model.eval(), data.evaluation, metric))


@torch.no_grad()
def evaluate(model: nn.Module, samples: Dataset[Any], metric: Callable[[Any, Any], Tensor]) -> float:
    """Mean of the metric's per-sample scores."""
    return float(torch.cat([metric(model(batch[0]), batch) for batch in DataLoader(samples, 64)]).mean())


def main() -> None:
    """Train the perception task as its README says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    model = build_model(weights=None)
    train(
        model,
        build_data(),
        loss,
        Found(),
        epochs=24,
        learning_rate=4e-3,
        weight_decay=0.02,
        batch_size=64,
        seed=0,
    )
    save_file(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
