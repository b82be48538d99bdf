"""A small detector with two heads, its data and its metric: what a user brings to qflow.

A picture shows one filled circle on a road of gray noise, by day or by night (64 times darker). The network looks at
the picture as it is and at a copy that is 32 times brighter, in which the night can be seen. The score head says in
which cell of 8x8 pixels the centre of the circle lies, the box head how large it is. The pictures are drawn and the
network is trained when the task is built, in about half a minute.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SIZE, CELL = 64, 8
CELLS = SIZE // CELL
NIGHT = 1 / 64


def pictures(count: int, seed: int) -> TensorDataset:
    """`count` samples: image float32 [1, 64, 64], cell int64 (of 64), radius float32 in pixels."""
    generator = torch.Generator().manual_seed(seed)
    radius = 3 + 6 * torch.rand(count, generator=generator)
    centre = 10 + (SIZE - 20) * torch.rand(count, 2, generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    square = (y - centre[:, 0, None, None]) ** 2 + (x - centre[:, 1, None, None]) ** 2
    shape = torch.sigmoid(2 * (radius[:, None, None] - square.sqrt()))
    noise = torch.rand(count, SIZE, SIZE, generator=generator)
    light = torch.where(torch.rand(count, generator=generator) < 0.4, NIGHT, 1.0)
    image = light[:, None, None] * (0.25 * noise + 0.35 * shape + 0.2)
    cell = (centre[:, 0] // CELL * CELLS + centre[:, 1] // CELL).long()
    return TensorDataset(image[:, None], cell, radius)


class Data:
    """Calibration takes pictures that the network was trained on; evaluation takes others."""

    def __init__(self, calibration: int = 256, evaluation: int = 1024) -> None:
        self.calibration, self.evaluation = pictures(calibration, 0), pictures(evaluation, 1)


def block(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU: one operator on the device."""
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU())


class Detector(nn.Module):
    """A backbone of stride 8 and two heads on its features."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = block(2, width, 2)
        self.down = nn.Sequential(block(width, width, 2), block(width, width), block(width, width, 2))
        self.level = block(width, width)
        self.score = nn.Sequential(block(width, width), nn.Conv2d(width, 1, 1))
        self.box = nn.Sequential(block(width, width), nn.Conv2d(width, 1, 1))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, 64] of the cells, and the radius in pixels [B, 64] that each cell sees."""
        bright = (32 * image).clamp(0.0, 1.0)
        x = self.down(self.stem(torch.cat([image, bright], 1)))
        x = self.level(x) + x
        return self.score(x).flatten(1), self.box(x).flatten(1)


def build_model(epochs: int = 16, weights: str = "detector.pt") -> nn.Module:
    """The trained network: from the file `weights` if there is one, else trained, and written there."""
    torch.manual_seed(0)
    model = Detector()
    if Path(weights).exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()
    images, cells, radii = pictures(2048, 0).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * 32)
    for _ in range(epochs):
        for index in torch.randperm(2048).split(64):
            scores, sizes = model(images[index])
            size = sizes.gather(1, cells[index, None])[:, 0]
            loss = F.cross_entropy(scores, cells[index]) + 0.05 * F.smooth_l1_loss(size, radii[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.save(model.state_dict(), weights)
    return model.eval()


class Found:
    """Share of pictures in which the best cell is the right one and its radius is right within a tenth."""

    name, direction, bounds = "found", "maximize", (0.0, 1.0)

    def __call__(self, outputs: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One score for each sample, float32 [B]."""
        (scores, sizes), (_, cell, radius) = outputs, batch
        best = scores.argmax(1)
        size = sizes.gather(1, best[:, None])[:, 0]
        return ((best == cell) & ((size - radius).abs() <= radius / 10)).float()
