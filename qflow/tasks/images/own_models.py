"""The user's own model on images with a stated preprocessing (`task=segmentation`), and the same for torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from qflow.core.errors import ConfigError
from qflow.tasks.images.samples import Fit, ImageFiles

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images of ImageNet, on which most backbones are trained."""


@dataclass(frozen=True)
class Scaled:
    """An image at a fixed size, whatever its proportions, as (x / 255 - mean) / std."""

    size: tuple[int, int]
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB -> float32 [3, height, width]."""
        height, width = self.size
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        mean, std = (np.array(v, dtype=np.float32) for v in (self.mean, self.std))
        return torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())


def scaled(size: Sequence[int] | None, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Scaled:
    """The preprocessing of a task that states it. Raises ConfigError for impossible numbers."""
    numbers = tuple(size or ())
    if len(numbers) != 2 or not all(isinstance(n, int) and 0 < n <= 16384 for n in numbers):
        raise ConfigError(f"task.data.size is [height, width], but got {size}. Set task.data.size=[512,1024].")
    if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
        raise ConfigError(
            f"task.data.mean and std have a number for each of red, green, blue, and std is above 0, but got {mean} "
            f"and {std}. Leave them out for those of ImageNet."
        )
    return Scaled((numbers[0], numbers[1]), tuple(mean), tuple(std))


def build_data(
    *,
    root: str | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dense: bool = True,
    **settings: Any,
) -> ImageFiles:
    """The images in `root` with masks (`images/`, `masks/`) for `dense` models, else with class folders, or neither."""
    transform = scaled(size, mean, std)

    def fit(model: nn.Module) -> Fit:
        return Fit(transform, dense=dense)

    return ImageFiles(root=root, fit=fit, **settings)
