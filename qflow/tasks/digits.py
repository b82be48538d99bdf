"""The smallest built-in task: scikit-learn's handwritten digits, and a network that trains in about a second.

Images are 8x8, gray, float32 [1, 8, 8] in [0, 1]; the target is the digit. Nothing is stored: the images come
with scikit-learn (1,797 of them, CC BY 4.0) and the weights are trained when the model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qflow.core.installed import folder_of

Batch = tuple[Tensor, Tensor]  # image [B, 1, 8, 8], digit int64 [B]
HELD_OUT = 597  # images kept for evaluation; 1,200 are left for training
TRAIN_BATCH = 60  # 20 steps an epoch


@dataclass(frozen=True, kw_only=True)
class DigitsData:
    """Samples (image, digit) in three splits: calibration is a part of train, evaluation is separate from both."""

    train: TensorDataset
    calibration: TensorDataset
    evaluation: TensorDataset

    def sample_classes(self, batch: Batch) -> list[int]:
        """The digit of each sample, for the rule of promote on the worst class."""
        return [int(label) for label in batch[1]]


def build_data(*, calibration_size: int = 128, seed: int = 0) -> DigitsData:
    """Shuffle by `seed` and split."""
    rows = torch.from_numpy(np.loadtxt(folder_of("sklearn") / "datasets" / "data" / "digits.csv.gz", delimiter=","))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    images = rows[:, :-1].float().reshape(-1, 8, 8)[order, None] / 16
    labels = rows[:, -1].long()[order]
    if not 0 < calibration_size <= len(order) - HELD_OUT:
        raise ValueError(
            f"calibration_size must lie in 1..{len(order) - HELD_OUT}, the number of training images; "
            f"got {calibration_size}."
        )
    return DigitsData(
        train=TensorDataset(images[HELD_OUT:], labels[HELD_OUT:]),
        calibration=TensorDataset(*(part[HELD_OUT:][:calibration_size] for part in (images, labels))),
        evaluation=TensorDataset(images[:HELD_OUT], labels[:HELD_OUT]),
    )


class DigitsNet(nn.Module):
    """Three convolutions with batch norm, one with a residual connection, and a dense layer: 10 scores per image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.dense = nn.Linear(32 * 4 * 4, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(image)))
        x = x + self.relu(self.norm2(self.conv2(x)))
        x = self.relu(self.norm3(self.conv3(x)))
        scores: Tensor = self.dense(x.flatten(1))
        return scores


def build_model(*, epochs: int = 8, seed: int = 0) -> nn.Module:
    """Train the float network in about a second; returned in eval mode. The global random state does not change."""
    return fit(DigitsNet, build_data().train, epochs=epochs, seed=seed)


def fit(network: Callable[[], nn.Module], samples: TensorDataset, *, epochs: int, seed: int) -> nn.Module:
    """A `network` trained on `samples`, in eval mode; repeatable, and the global random state does not change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # repeatable, and not slower, as the network is too small for threads
    try:
        return _trained(network, samples, epochs, seed)
    finally:
        torch.set_num_threads(threads)


def _trained(network: Callable[[], nn.Module], samples: TensorDataset, epochs: int, seed: int) -> nn.Module:
    images, labels = samples.tensors
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(epochs):
            for index in torch.split(torch.randperm(len(labels)), TRAIN_BATCH):
                value = loss(model(images[index]), (images[index], labels[index]))
                optimizer.zero_grad()
                torch.autograd.backward(value)
                optimizer.step()
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of images whose digit has the highest score."""

    name: ClassVar[str] = "accuracy"
    direction: ClassVar[str] = "maximize"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        """One score per image, float32 [B]: 1 right, 0 wrong."""
        return (outputs.argmax(dim=1) == batch[1]).float()


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    """Cross entropy."""
    return F.cross_entropy(outputs, batch[1])
