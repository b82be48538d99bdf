"""Geometry of boxes: the letterbox that fits a picture into the network's input, and the removal of double boxes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Letterbox:
    """How a picture lies in an input of fixed size: scaled with its proportions kept, in the middle of a border."""

    picture: tuple[int, int]
    """Width and height of the picture."""
    scaled: tuple[int, int]
    """Width and height of the picture in the input."""
    corner: tuple[int, int]
    """Left and top of the picture in the input."""
    scale: float
    """Pixels of the input for one of the picture."""

    @property
    def place(self) -> Tensor:
        """What `to_picture` needs, float64 [5]: scale, left, top, width and height of the picture."""
        return torch.tensor([self.scale, *self.corner, *self.picture], dtype=torch.float64)


def letterbox(picture: tuple[int, int], inside: tuple[int, int]) -> Letterbox:
    """Fit a picture of (width, height) into an input of (height, width). A small picture grows."""
    (width, height), (rows, columns) = picture, inside
    scale = min(rows / height, columns / width)
    scaled = max(round(width * scale), 1), max(round(height * scale), 1)
    return Letterbox(picture, scaled, ((columns - scaled[0]) // 2, (rows - scaled[1]) // 2), scale)


def to_picture(boxes: Tensor, place: Tensor) -> Tensor:
    """Boxes [K, 4] of the input in pixels of the picture, cut at its edges: float64, left, top, right, bottom."""
    scale, left, top, width, height = place.double().unbind()
    moved = (boxes.double() - torch.stack([left, top, left, top])) / scale
    return torch.minimum(moved.clamp(min=0.0), torch.stack([width, height, width, height]))


def overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union [K, K] of boxes [K, 4] (left, top, right, bottom) with each other."""
    inner = torch.minimum(boxes[:, None, 2:], boxes[:, 2:]) - torch.maximum(boxes[:, None, :2], boxes[:, :2])
    common, areas = inner.clamp(min=0).prod(2), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return common / (areas[:, None] + areas - common).clamp(min=1e-9)


def best_boxes(
    boxes: Tensor, scores: Tensor, *, least_score: float, most_overlap: float, candidates: int = 1000
) -> dict[str, Tensor]:
    """The boxes that stay after non-maximum suppression by class, best first.

    `boxes` float32 [N, 4] are left, top, right, bottom; `scores` float32 [N, C] are one a class. The best `candidates`
    pairs of box and class that score more than `least_score` are compared: one that overlaps a better one of its class
    by more than `most_overlap` (intersection over union) is left out. Of equal scores the first in the order of boxes
    is better. Returns `boxes` [K, 4], `scores` [K], `labels` int64 [K].
    """
    box, label = (scores > least_score).nonzero(as_tuple=True)
    found = scores[box, label]
    order = torch.sort(found, descending=True, stable=True).indices[:candidates]
    chosen, label, found = boxes[box[order]], label[order], found[order]
    doubles = ((overlaps(chosen) > most_overlap) & (label[:, None] == label)).cpu().numpy()
    stays = np.ones(len(found), dtype=bool)
    for k in range(len(stays)):
        if stays[k]:
            stays[k + 1 :] &= ~doubles[k, k + 1 :]
    keep = torch.from_numpy(stays).to(found.device)
    return {"boxes": chosen[keep], "scores": found[keep], "labels": label[keep]}
