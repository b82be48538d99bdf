"""Training of the benchmark's networks in one thread with fixed seeds; weights are kept by recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Loss = Callable[[object, Sequence[Tensor]], Tensor]
Data = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: Adam with one learning-rate cycle."""

    name: str
    network: Callable[[], nn.Module]
    data: Data
    """Gives (inputs, targets...), with the samples along the first axis; called only if the weights are not kept."""
    loss: Loss
    """loss(outputs, batch)"""
    epochs: int
    rate: float = 4e-3
    batch: int = 64
    seed: int = 0
    mirrored: bool = False
    """Half of the images are mirrored; for targets that do not change with it."""

    @property
    def file(self) -> str:
        """The name of the kept weights, with all that they depend on beside code and data."""
        mirrored = "-mirrored" if self.mirrored else ""
        return f"{self.name}-seed{self.seed}-epochs{self.epochs}-rate{self.rate:g}-batch{self.batch}{mirrored}.pt"


def trained(recipe: Recipe, folder: Path) -> nn.Module:
    """The network in eval mode, with the weights kept in `folder`, or trained and kept there."""
    path = folder / recipe.file
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(recipe.seed)
        model = recipe.network()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        elif recipe.epochs:
            _fit(model, recipe)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), path)
    return model.eval()


def _fit(model: nn.Module, recipe: Recipe) -> None:
    data = recipe.data()
    count = len(data[0])
    steps = recipe.epochs * math.ceil(count / recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps)
    model.train()
    for _ in range(recipe.epochs):
        for index in torch.randperm(count).split(recipe.batch):
            inputs, *targets = (tensor[index] for tensor in data)
            if recipe.mirrored:
                half = torch.rand(len(inputs), 1, 1, 1) < 0.5
                inputs = torch.where(half, inputs.flip(-1), inputs)
            optimizer.zero_grad()
            recipe.loss(model(inputs), [inputs, *targets]).backward()
            optimizer.step()
            schedule.step()
