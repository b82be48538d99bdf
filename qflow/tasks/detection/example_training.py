"""Training of a small detector on the drawn pictures, in less than a minute.

The detector gives logits [B, C, h, w] and log distances [B, 4, h, w]: from the centre of a cell to left, top, right and
bottom of its box, in cells. It learns as FCOS does: cells in the middle of a box have its class and its box.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qflow.tasks.detection.data import Pictures, Truth, collated

BATCH, RATE = 8, 1e-2
MIRRORED = {-1: [2, 1, 0, 3], -2: [0, 3, 2, 1]}  # axis -> the sides left, top, right, bottom after a flip along it
MIDDLE = 0.2  # a cell is in the middle of a box within this share of its sides from the centre


def train_example(model: nn.Module, pictures: Pictures, epochs: int = 30) -> nn.Module:
    """Train `model` on all `pictures` in memory; repeatable on one machine. Returns it in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        images, truths = collated([pictures[i] for i in range(len(pictures))])
        categories = sorted({int(c) for truth in truths for c in truth["categories"]})
        with torch.no_grad():
            height, width = model.eval()(images[:1])[0].shape[-2:]
        targets = [targets_of(truth, images.shape[-1] / width, (height, width), categories) for truth in truths]
        labels, sides = (torch.stack(part) for part in zip(*targets, strict=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        steps = epochs * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(epochs):
            for some in torch.split(torch.randperm(len(images)), BATCH):
                image, label, side = images[some], labels[some], sides[some]
                for axis, swapped in MIRRORED.items():
                    if torch.rand(()) < 0.5:
                        image, label, side = image.flip(axis), label.flip(axis), side.flip(axis)[:, swapped]
                value = loss(model.train()(image), label, side)
                optimizer.zero_grad()
                torch.autograd.backward(value)
                optimizer.step()
                schedule.step()
    return model.eval()


def loss(outputs: tuple[Tensor, Tensor], labels: Tensor, sides: Tensor) -> Tensor:
    """Focal loss of the classes at all cells, and 1 - IoU of the boxes at cells with an object."""
    scores, distances = outputs
    here = labels.amax(1) > 0
    error = (scores.sigmoid() - labels).abs()
    of_classes = (F.binary_cross_entropy_with_logits(scores, labels, reduction="none") * error**2).sum()
    ours, theirs = (part.exp().movedim(1, -1)[here] for part in (distances, sides))
    common = _area(torch.minimum(ours, theirs))
    iou = common / (_area(ours) + _area(theirs) - common)
    return (of_classes + 2 * (1 - iou).sum()) / here.sum().clamp(min=1)


def targets_of(truth: Truth, stride: float, shape: tuple[int, int], categories: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Classes [C, h, w] of a picture as 0 and 1, and log distances [4, h, w] where there is one."""
    labels, sides = torch.zeros(len(categories), *shape), torch.zeros(4, *shape)
    scale, left, top = truth["place"][:3].float().unbind()
    y, x = torch.meshgrid(*(torch.arange(cells) + 0.5 for cells in shape), indexing="ij")
    corners = truth["boxes"].float() * scale / stride
    corners[:, :2] += torch.stack([left, top]) / stride
    corners[:, 2:] += corners[:, :2]
    for k in truth["areas"].argsort(descending=True).tolist():  # a small object over a large one
        if truth["crowd"][k]:
            continue
        edges = torch.stack([x, y, -x, -y]) - (corners[k] * torch.tensor([1.0, 1.0, -1.0, -1.0])).reshape(4, 1, 1)
        across, down = (edges[0] - edges[2]).abs() / 2, (edges[1] - edges[3]).abs() / 2  # from the centre
        reach = (MIDDLE * (corners[k, 2:] - corners[k, :2])).clamp(min=0.51)
        here = (across <= reach[0]) & (down <= reach[1])
        labels[:, here] = 0.0
        labels[categories.index(int(truth["categories"][k])), here] = 1.0
        sides[:, here] = edges.clamp(min=0.05).log()[:, here]
    return labels, sides


def _area(distances: Tensor) -> Tensor:
    """Area of boxes, from the distances [K, 4] of a point inside to their sides."""
    left, top, right, bottom = distances.unbind(-1)
    return (left + right) * (top + bottom)
