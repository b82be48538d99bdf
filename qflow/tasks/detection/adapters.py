"""From the outputs of known detectors to boxes. What they do runs in float, outside of the quantized model.

An adapter is called with the model's outputs and (height, width) of its input. For each picture it returns `boxes`
[K, 4] (left, top, right, bottom in pixels of the input), `scores` [K] and `labels` int [K]. A function or class of your
own in `task.metric.adapter._target_` does the same; `boxes.best_boxes` is the last step of most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qflow.core.errors import ConfigError
from qflow.tasks.detection.boxes import best_boxes


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """How double boxes are left out, by default as detectors are evaluated: nearly all scores count."""

    least_score: float = 0.001
    most_overlap: float = 0.7
    """Largest intersection over union of two boxes of a class that both stay."""
    most: int = 300
    """Boxes of a picture that stay."""

    def kept(self, boxes: Tensor, scores: Tensor) -> list[dict[str, Tensor]]:
        """What stays of boxes [B, N, 4] and their scores [B, N, C], a picture each."""
        found = (
            best_boxes(b, s, least_score=self.least_score, most_overlap=self.most_overlap)
            for b, s in zip(boxes.float(), scores.float(), strict=True)
        )
        return [{name: values[: self.most] for name, values in one.items()} for one in found]


@dataclass(frozen=True, kw_only=True)
class UltralyticsBoxes(Suppression):
    """Outputs [B, 4 + C, N] of an Ultralytics YOLO that decodes its own boxes: x and y of the centre, width, height in
    pixels, and a score in 0 to 1 for each of C classes. Of a tuple the first item is taken.

    One scale for pixels and scores leaves few steps for the scores: see `UltralyticsMaps`.
    """

    def __call__(self, outputs: Any, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """What stays, a picture each."""
        found = outputs[0] if isinstance(outputs, (tuple, list)) else outputs
        _require(isinstance(found, Tensor) and found.ndim == 3 and found.shape[1] > 4, "a tensor [B, 4 + C, N]", found)
        centre, extent, scores = found.mT.split([2, 2, found.shape[1] - 4], dim=-1)
        return self.kept(torch.cat([centre - extent / 2, centre + extent / 2], dim=-1), scores)


@dataclass(frozen=True, kw_only=True)
class UltralyticsMaps(Suppression):
    """Outputs of the convolutions of an Ultralytics YOLO head: a map [B, 4 * bins + C, h, w] for each stride.

    The first 4 * bins channels are logits of the distances from a cell's centre to left, top, right and bottom, in
    cells: the distance is the expectation of 0 ... bins - 1 under their softmax (distribution focal loss). The others
    are logits of the classes. The stride of a map follows from its height.
    """

    bins: int = 16

    def __call__(self, outputs: Any, size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """What stays, a picture each."""
        maps = [outputs] if isinstance(outputs, Tensor) else outputs
        sides = 4 * self.bins
        for found in maps if isinstance(maps, (tuple, list)) else [maps]:
            fits = isinstance(found, Tensor) and found.ndim == 4 and found.shape[1] > sides
            _require(fits, f"maps [B, {sides} + C, h, w]", found)
        boxes = torch.cat([self._boxes(found[:, :sides].float(), size) for found in maps], dim=1)
        scores = torch.cat([found[:, sides:].flatten(2).mT for found in maps], dim=1)
        return self.kept(boxes, scores.float().sigmoid())

    def _boxes(self, logits: Tensor, size: tuple[int, int]) -> Tensor:
        batch, _, height, width = logits.shape
        stride = size[0] / height
        shares = logits.reshape(batch, 4, self.bins, height * width).softmax(2)
        distances = torch.einsum("bskn,k->bns", shares, torch.arange(self.bins).to(shares))
        return (cell_centres(height, width).to(logits).repeat(1, 2) + distances * _OUTWARD.to(logits)) * stride


_OUTWARD = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # left and top lie before the centre


def cell_centres(height: int, width: int) -> Tensor:
    """Centre x, y of each cell of a map, in cells: float32 [height * width, 2], row after row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1) + 0.5


def _require(fits: bool, wanted: str, got: Any) -> None:
    if not fits:
        shown = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise ConfigError(f"The adapter takes {wanted}, but got {shown}. Choose another in task.metric.adapter.")
