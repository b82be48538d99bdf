"""Rendered images of a detection task: an item of Fashion-MNIST on a background cut from a photograph.

Every image is 96x96 RGB and contains one item of 5 classes at a random place, size, tint and exposure. The target is
its class and the tight box around its own pixels, not around the 28x28 frame that it comes in. Everything follows from
a seed.

The images are those of a 12-bit camera with a fixed gain, as in a car: at night an image uses a fiftieth of the range
that it uses by day, and its item is still clearly visible in float. This range makes int8 difficult here.

No item is in two splits: train and calibration have different training items, evaluation has test items. Backgrounds
of evaluation come from the right part of the photographs, those of train and calibration from the left part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from qflow.core.installed import folder_of

SIDE = 96  # pixels, of an image
FRAME = 28  # pixels, of an item in Fashion-MNIST
CLASSES = ("top", "trousers", "dress", "shoe", "bag")
# Class of Fashion-MNIST's t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.
KIND = (0, 1, 0, 2, 0, 3, 0, 3, 4, 3)
GROUND_BORDER = 448  # column of the 427x640 photographs: training uses the part left of it, evaluation the right one
SIZES = (28.0, 80.0)  # pixels of an image that the 28 pixels of the frame are scaled to
WHITE = 4095  # largest pixel value of a 12-bit camera
EXPOSURES = (0.02, 1.0)  # brightness of white in the camera's range, at night and by day; drawn log-uniformly


class Target(TypedDict):
    """What the detector should find: `label` int64 [], `box` float32 [4] = left, top, right, bottom in pixels."""

    label: Tensor
    box: Tensor


class Pictures(Dataset[tuple[Tensor, Target]]):
    """One rendered image for each item, as samples (image float32 [3, 96, 96] in [0, 1], target).

    Pixels of 12 bits are divided by 4095. All images are rendered at first use and kept as int16.
    """

    def __init__(self, items: Tensor, labels: Tensor, grounds: Tensor, seed: int) -> None:
        """Take `items` uint8 [N, 28, 28], their `labels` int64 [N], `grounds` uint8 [photos, height, width, 3]."""
        self.items, self.labels, self.grounds, self.seed = items, labels, grounds, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Render the items again at other places, sizes, tints, exposures and backgrounds for each epoch."""
        self.epoch = epoch
        self.__dict__.pop("rendered", None)

    @cached_property
    def rendered(self) -> tuple[Tensor, Tensor]:
        """Images int16 [N, 3, 96, 96] in 0..4095 and boxes float32 [N, 4]."""
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch)
        chunks = [render(chunk, self.grounds, generator) for chunk in torch.split(self.items, 256)]
        return torch.cat([images for images, _ in chunks]), torch.cat([boxes for _, boxes in chunks])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        images, boxes = self.rendered
        image = images[index].float().div_(WHITE)
        return image, {"label": self.labels[index], "box": boxes[index]}


def render(items: Tensor, grounds: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Place `items` uint8 [N, 28, 28] on backgrounds: images int16 [N, 3, 96, 96], boxes float32 [N, 4]."""
    count = len(items)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    tight = tight_boxes(items)
    scale = uniform(*SIZES) / FRAME
    extent = (tight[:, 2:] - tight[:, :2]) * scale[:, None]
    corner = uniform(0.0, 1.0, 2) * (SIDE - extent) - tight[:, :2] * scale[:, None]  # where the frame begins
    boxes = tight * scale[:, None] + corner.repeat(1, 2)

    # A pixel centre p of the image shows the point (p - corner) / scale of the frame, both in pixels.
    pixel = torch.arange(SIDE) + 0.5
    x, y = ((pixel - corner[:, axis, None]) / scale[:, None] * (2 / FRAME) - 1 for axis in (0, 1))
    grid = torch.stack([x[:, None, :].expand(-1, SIDE, -1), y[:, :, None].expand(-1, -1, SIDE)], dim=-1)
    gray = items[:, None].float() / 255
    layers = F.grid_sample(torch.cat([gray, (gray > 0).float()], dim=1), grid, align_corners=False)
    shade, cover = layers[:, :1], layers[:, 1:]

    tint = uniform(0.5, 1.0, 3, 1, 1) * uniform(0.7, 1.2, 1, 1, 1)
    image = cut(grounds, count, generator) * (1 - cover) + tint * shade.maximum(0.1 * cover)
    image *= torch.exp(uniform(math.log(EXPOSURES[0]), math.log(EXPOSURES[1]), 1, 1, 1))
    return (image.clamp(0, 1) * WHITE).round().to(torch.int16), boxes


def tight_boxes(items: Tensor) -> Tensor:
    """Left, top, right, bottom of the pixels above zero, float32 [N, 4] in pixels of the frame."""
    sides = []
    for axis in (1, 2):  # reduce the rows to find left and right, then the columns to find top and bottom
        filled = (items > 0).any(dim=axis).float()
        sides.append((filled.argmax(dim=1), FRAME - filled.flip(1).argmax(dim=1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()


def cut(grounds: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random windows of the photographs, half of them mirrored: float32 [count, 3, 96, 96] in 0..1."""
    photographs, height, width, _ = grounds.shape
    which, top, left, mirrored = (
        torch.randint(high, (count,), generator=generator)
        for high in (photographs, height - SIDE + 1, width - SIDE + 1, 2)
    )
    span = torch.arange(SIDE)
    columns = torch.where(mirrored[:, None] == 1, span.flip(0), span) + left[:, None]
    windows = grounds[which[:, None, None], (top[:, None] + span)[:, :, None], columns[:, None, :]]
    return windows.permute(0, 3, 1, 2).float() / 255


@dataclass(frozen=True, kw_only=True)
class PerceptionData:
    """The three splits have no item in common; the augmented ones mirror half of the items and place all anew."""

    train: Pictures
    calibration: Pictures
    evaluation: Pictures
    train_augmented: Pictures
    calibration_augmented: Pictures


def build_data(*, calibration_size: int = 256, evaluation_size: int = 1536, seed: int = 0) -> PerceptionData:
    """Read the stored items and scikit-learn's photographs; training gets the items that calibration leaves."""
    with np.load(Path(__file__).with_name("fashion.npz")) as stored:
        items, labels = torch.from_numpy(stored["train_items"]), torch.from_numpy(stored["train_labels"])
        test_items, test_labels = torch.from_numpy(stored["test_items"]), torch.from_numpy(stored["test_labels"])
    if not 0 < calibration_size < len(items) or not 0 < evaluation_size <= len(test_items):
        raise ValueError(
            f"There are {len(items)} items for calibration and training, {len(test_items)} for evaluation; "
            f"got calibration_size={calibration_size}, evaluation_size={evaluation_size}."
        )
    paths = sorted((folder_of("sklearn") / "datasets" / "images").glob("*.jpg"))
    photographs = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths]))
    seen, unseen = photographs[:, :, :GROUND_BORDER], photographs[:, :, GROUND_BORDER:]
    kinds, test_kinds = (torch.tensor(KIND)[part.long()] for part in (labels, test_labels))
    spare, kept, tested = slice(calibration_size), slice(calibration_size, None), slice(evaluation_size)
    mirrored = torch.where((torch.arange(len(items)) % 2 == 1)[:, None, None], items.flip(2), items)
    return PerceptionData(
        train=Pictures(items[kept], kinds[kept], seen, 3 * seed),
        calibration=Pictures(items[spare], kinds[spare], seen, 3 * seed + 1),
        evaluation=Pictures(test_items[tested], test_kinds[tested], unseen, 3 * seed + 2),
        train_augmented=Pictures(mirrored[kept], kinds[kept], seen, 3 * seed + 1_000_003),
        calibration_augmented=Pictures(mirrored[spare], kinds[spare], seen, 3 * seed + 1_000_004),
    )
