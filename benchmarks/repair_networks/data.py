"""The data of the benchmark's networks: the items of Fashion-MNIST that qflow ships, alone and composed to scenes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from qflow.tasks import perception
from qflow.tasks.perception.data import KIND

ITEMS = Path(perception.__file__).with_name("fashion.npz")
SIDE = 48  # pixels of a scene
GROUND = 5  # the class of pixels without an item; kinds are 0..4


def items() -> tuple[TensorDataset, TensorDataset]:
    """(image float32 [1, 28, 28] in 0..1, class 0..9): 10,000 to train with, 1,536 others to test."""
    with np.load(ITEMS) as stored:
        parts = [(stored[f"{part}_items"], stored[f"{part}_labels"]) for part in ("train", "test")]
    train, test = (
        TensorDataset(torch.from_numpy(pictures).float()[:, None] / 255, torch.from_numpy(labels).long())
        for pictures, labels in parts
    )
    return train, test


def scenes(split: TensorDataset, count: int, seed: int) -> TensorDataset:
    """(scene float32 [1, 48, 48], kind of each pixel int64 [48, 48]): two items a scene, later ones before earlier, on
    a ground of smooth noise.
    """
    pictures, labels = split.tensors
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=generator) * 0.4
    ground = torch.nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    scene = ground + 0.05 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    kinds = torch.full((count, SIDE, SIDE), GROUND)
    kind = torch.tensor(KIND)[labels]
    for _ in range(2):
        chosen = torch.randint(len(labels), (count,), generator=generator)
        corner = torch.randint(SIDE - 28 + 1, (count, 2), generator=generator)
        for i, (item, (top, left)) in enumerate(zip(chosen.tolist(), corner.tolist(), strict=True)):
            place = (slice(top, top + 28), slice(left, left + 28))
            cover = pictures[item, 0] > 0.1
            scene[i, 0][place] = torch.where(cover, pictures[item, 0], scene[i, 0][place])
            kinds[i][place] = torch.where(cover, kind[item], kinds[i][place])
    return TensorDataset(scene, kinds)


class MeanIoU:
    """Intersection over union of each kind that a scene or the answer holds, averaged over the kinds of the scene."""

    name = "miou"
    direction = "maximize"

    def __call__(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One score for each scene, float32 [B]."""
        answer, kinds = outputs.argmax(1), batch[1]
        total, present = torch.zeros(len(kinds)), torch.zeros(len(kinds))
        for kind in range(GROUND + 1):
            found, right = (answer == kind).flatten(1), (kinds == kind).flatten(1)
            union = (found | right).sum(1)
            total += (found & right).sum(1) / union.clamp(min=1)
            present += (union > 0).float()
        return total / present


def splits(calibration: TensorDataset, evaluation: TensorDataset, samples: int, evaluated: int) -> SimpleNamespace:
    """The first `samples` of one set to calibrate with, the first `evaluated` of another to evaluate."""

    def first(split: TensorDataset, count: int) -> TensorDataset:
        return TensorDataset(*(tensor[:count] for tensor in split.tensors))

    return SimpleNamespace(calibration=first(calibration, samples), evaluation=first(evaluation, evaluated))
