"""Decoding of the detector's boxes, its metric, and the loss it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qflow.tasks.perception.data import Target
from qflow.tasks.perception.model import STRIDE

Outputs = tuple[Tensor, Tensor]  # scores [B, classes, h, w], distances [B, 4, h, w]
Batch = tuple[Tensor, Target]  # image [B, 3, H, W]; label [B], box [B, 4]


def decode(distances: Tensor) -> Tensor:
    """Boxes [B, h * w, 4] in pixels from distances [B, 4, h, w] in cells, both as left, top, right, bottom."""
    centres = cell_centres(distances)
    return centres.repeat(1, 2) + distances.flatten(2).mT * distances.new_tensor([-1, -1, 1, 1]) * STRIDE


def cell_centres(grid: Tensor) -> Tensor:
    """Centre x, y of each cell of `grid` [..., h, w] in pixels: [h * w, 2], row after row."""
    height, width = grid.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([x, y], dim=-1).flatten(0, 1).to(grid) + 0.5) * STRIDE


def overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of boxes [..., 4], and the same minus the empty share of their hull (GIoU)."""
    inner = (boxes[..., 2:].minimum(others[..., 2:]) - boxes[..., :2].maximum(others[..., :2])).clamp(min=0)
    hull = (boxes[..., 2:].maximum(others[..., 2:]) - boxes[..., :2].minimum(others[..., :2])).clamp(min=0)
    areas = [(box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (boxes, others)]
    union = areas[0] + areas[1] - inner.prod(-1)
    iou = inner.prod(-1) / union.clamp(min=1e-6)
    return iou, iou - 1 + union / hull.prod(-1).clamp(min=1e-6)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Share of images whose best-scored cell has the right class and a box that fits."""

    iou: float = 0.75
    """Least intersection over union of the box with the target's."""

    name: ClassVar[str] = "found"
    direction: ClassVar[str] = "maximize"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """One score per image, float32 [B]: 1 found, 0 not."""
        (scores, distances), (_, target) = outputs, batch
        best = scores.flatten(1).argmax(dim=1)  # over classes and cells at once
        label, cell = best // scores[0, 0].numel(), best % scores[0, 0].numel()
        box = decode(distances)[torch.arange(len(cell)), cell]
        iou, _ = overlap(box, target["box"])
        return ((label == target["label"]) & (iou >= self.iou)).float()


def loss(outputs: Outputs, batch: Batch) -> Tensor:
    """Binary cross entropy of the scores with the box's IoU as target, and GIoU loss of boxes at cells near the centre.

    A cell is near when its centre lies in the middle half of the box, or the box's centre lies in the cell.
    """
    (scores, distances), (_, target) = outputs, batch
    box = target["box"][:, None]  # [B, 1, 4]
    offset = (cell_centres(distances) - (box[..., :2] + box[..., 2:]) / 2).abs()  # [B, cells, 2]
    reach = ((box[..., 2:] - box[..., :2]) / 4).clamp(min=STRIDE / 2)
    near = (offset <= reach).all(dim=-1)
    iou, generalised = overlap(decode(distances), box)

    wanted = F.one_hot(target["label"], scores.shape[1])[:, None] * (iou.detach() * near)[..., None]
    score_loss = F.binary_cross_entropy_with_logits(scores.flatten(2).mT, wanted, reduction="none").sum()
    box_loss = (1 - generalised)[near].sum()
    return (score_loss + 2 * box_loss) / near.sum()
