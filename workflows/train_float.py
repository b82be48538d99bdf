"""Train a task's float model and save its weights: python -m workflows.train_float +experiment=train_perception

The training is supervised, with AdamW and a learning rate that rises for a tenth of the steps and then falls to zero by
a cosine. It is repeatable for a given seed and thread count. In an installed wheel the command is
`python -m qflow.workflows.train_float`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qflow.config.command import Result, run_command

if TYPE_CHECKING:  # each function imports what it uses, so that --help loads neither Hydra nor PyTorch
    from omegaconf import DictConfig
    from torch import Tensor, nn
    from torch.utils.data import Dataset

log = logging.getLogger(__name__)


class Data(Protocol):
    """The splits of a task's data that training needs; `set_epoch` of the train split, if it exists, is called."""

    @property
    def train(self) -> Dataset[Any]:
        """The training samples."""

    @property
    def evaluation(self) -> Dataset[Any]:
        """The samples on which the trained model is measured."""


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
    import torch
    from torch.utils.data import DataLoader

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


def evaluate(model: nn.Module, samples: Dataset[Any], metric: Callable[[Any, Any], Tensor]) -> float:
    """Return the mean of the metric's scores per sample."""
    import torch
    from torch.utils.data import DataLoader

    with torch.no_grad():
        return float(torch.cat([metric(model(batch[0]), batch) for batch in DataLoader(samples, 64)]).mean())


def train_float(config: DictConfig) -> Result:
    """Build the task with untrained weights, train and measure the model, and save its weights."""
    import torch
    from safetensors.torch import save_file

    from qflow.config.build import build_task, get_function
    from qflow.config.executor_schema import check_executor
    from qflow.config.settings import plain

    check_executor(config)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if config.executor.threads:
        torch.set_num_threads(config.executor.threads)
    torch.manual_seed(config.training.seed)
    task = build_task(config)
    loss = get_function(config.training.loss, "training.loss")
    settings = {key: value for key, value in plain(config.training).items() if key not in ("loss", "output")}
    train(task.model, task.data, loss, task.metric, **settings)
    output = Path(os.path.expanduser(config.training.output)).resolve()
    save_file(task.model.state_dict(), output)
    print(f"weights     {output}")
    return 0, {"written": str(output)}


def main() -> None:
    """Run the command."""
    run_command("train_float", train_float)


if __name__ == "__main__":
    main()
