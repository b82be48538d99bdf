"""Top-1 accuracy of classes, and mIoU of classes by pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from qflow.core.errors import ConfigError, DataError


class Top1:
    """Share of images whose class has the highest score."""

    name: ClassVar[str] = "top1"
    direction: ClassVar[str] = "maximize"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    needs_labels: ClassVar[bool] = True

    def __call__(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One score an image, float32 [B]: 1 right, 0 wrong. Raises ConfigError without scores [B, classes]."""
        scores, labels = _first(outputs, 2, "top-1 reads scores [images, classes]"), batch[1]
        if int(labels.max()) >= scores.shape[1]:
            raise DataError(
                f"A class is one of the model's {scores.shape[1]} outputs, but got number {int(labels.max())}. Name "
                "the class folder of each output, one a line: task.data.classes=<file>."
            )
        return (scores.argmax(dim=1) == labels).float()


class MeanIoU:
    """Mean over classes of intersection over union of pixels, as the PASCAL VOC challenge defines it.

    Pixels of `ignore_index` do not count, and neither does a class that neither a mask nor the model names. Scores of
    another size than the masks are resized to them (bilinear). `details` gives the IoU of each class.
    """

    name: ClassVar[str] = "miou"
    direction: ClassVar[str] = "maximize"
    needs_labels: ClassVar[bool] = True

    def __init__(self, *, ignore_index: int = 255, classes: Sequence[str] = ()) -> None:
        self.ignore_index, self.classes = ignore_index, tuple(map(str, classes))
        self._counts: Tensor | None = None  # [classes of masks, classes of the model] pixels

    def reset(self) -> None:
        """Forget all pixels."""
        self._counts = None

    def update(self, outputs: Any, batch: tuple[Tensor, Tensor]) -> None:
        """Count the pixels of a batch with masks [B, H, W]. Raises ConfigError or DataError."""
        scores, masks = _first(outputs, 4, "mIoU reads scores [images, classes, height, width]"), batch[1]
        if scores.shape[-2:] != masks.shape[-2:]:
            scores = F.interpolate(scores.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
        count, counted = scores.shape[1], masks != self.ignore_index
        labels, found = masks[counted], scores.argmax(dim=1)[counted]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < count:
            raise DataError(
                f"Masks hold classes 0 to {count - 1} and the ignore index {self.ignore_index}, but got "
                f"{int(labels.max())}. Set task.data.ignore_index, or correct the masks."
            )
        pixels = torch.bincount(labels * count + found, minlength=count * count).reshape(count, count).cpu()
        self._counts = pixels if self._counts is None else self._counts + pixels

    def compute(self) -> float:
        """The mean; NaN if no pixel counted."""
        found = self._iou()
        return float(found[~found.isnan()].mean())

    def details(self) -> Mapping[str, float]:
        """The IoU of each class by name, or by number where it has none."""
        named = len(self.classes) == len(found := self._iou().tolist())
        names = self.classes if named else [f"class {i}" for i in range(len(found))]
        return {f"iou/{name}": value for name, value in zip(names, found, strict=True) if value == value}

    def _iou(self) -> Tensor:
        if self._counts is None:
            return torch.full((1,), torch.nan)
        both = self._counts.diagonal().double()
        return both / (self._counts.sum(0) + self._counts.sum(1) - both)  # 0/0 is NaN: the class does not occur


def _first(outputs: Any, dimensions: int, rule: str) -> Tensor:
    """The first output with so many dimensions."""
    tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    for tensor in tensors:
        if tensor.ndim == dimensions:
            return tensor
    raise ConfigError(f"{rule}, but got outputs of shape {[list(t.shape) for t in tensors]}. Use metric=agreement.")
