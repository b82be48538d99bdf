"""A small network that sees a road from above: camera features are laid on the ground, and a memory follows a car.

The camera looks along a road of 32 x 64 m. Its picture is gray, 24 x 32; the farther a row of the ground is, the higher
and the narrower it is in the picture. A car drives on it and is often hidden. The target is the cell of 4 x 4 m that
holds the car, of 8 x 16, in every frame. The network keeps its map of the ground in the attribute `memory`.

The network gets the position of each cell as two more channels beside its features, in centimetres, and scales them
down before it reads them. In float this is harmless. At int8 the channels share one scale: it has steps of half a
metre, and the features, which are a few units large, are gone.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

ROWS, COLUMNS = 16, 8  # cells of 4 m: 64 m far, 32 m wide
HEIGHT, WIDTH = 24, 32
FRAMES = 8
CAMERA = 6.0  # metres above the ground


def in_picture(along: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
    """Where a place on the ground is seen: x and y in -1..1, for metres from the camera and from the middle."""
    depth = along + 8.0
    return across / depth * 0.8, 2.0 * CAMERA / depth - 0.5


def draw(sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures float32 [N, T, 1, 24, 32] and cells int64 [N, T]; the first two frames always show the car."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(sequences, 1, 2, generator=generator) * torch.tensor([60.0, 20.0]) + torch.tensor([2.0, -10.0])
    speed = torch.randn(sequences, 1, 2, generator=generator) * torch.tensor([3.0, 1.0])
    place = start + speed * torch.arange(FRAMES)[:, None]
    place = torch.stack([place[..., 0].clamp(1.0, 63.0), place[..., 1].clamp(-15.0, 15.0)], -1)
    x, y = in_picture(place[..., 0], place[..., 1])
    rows, columns = torch.linspace(-1, 1, HEIGHT), torch.linspace(-1, 1, WIDTH)
    size = (3.0 / (place[..., 0] + 8.0)).clamp_min(0.06)[..., None, None]
    square = (rows[:, None] - y[..., None, None]) ** 2 + (columns - x[..., None, None]) ** 2
    shown = torch.rand(sequences, FRAMES, generator=generator) < 0.7
    shown[:, :2] = True
    car = torch.exp(-square / size**2) * shown[..., None, None]
    picture = car + 0.1 * torch.randn(car.shape, generator=generator)
    cell = (place[..., 0] // 4 * COLUMNS + (place[..., 1] + 16) // 4).long()
    return picture[:, :, None], cell


class Frames(TensorDataset):
    """Frames (picture, cell) one after another; `sequences` are their numbers in each sequence."""

    def __init__(self, sequences: int, seed: int) -> None:
        pictures, cells = draw(sequences, seed)
        super().__init__(pictures.flatten(0, 1), cells.flatten())
        self.sequences = [FRAMES] * sequences


class Data:
    """Calibration sequences are among those that the network was trained on; evaluation sequences are others."""

    def __init__(self, calibration: int = 64, evaluation: int = 96) -> None:
        self.calibration, self.evaluation = Frames(calibration, 0), Frames(evaluation, 1)


class Bev(nn.Module):
    """Features of the camera, laid on the ground, beside positions; a memory; a score for each cell."""

    def __init__(self, width: int = 16, unit: float = 0.01) -> None:
        """`unit`: of the positions, in metres; the function is the same for all."""
        super().__init__()
        self.camera = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        )  # fmt: skip
        along, across = torch.meshgrid(
            2.0 + 4.0 * torch.arange(ROWS), 4.0 * torch.arange(COLUMNS) - 14.0, indexing="ij"
        )
        self.register_buffer("ground", torch.stack(in_picture(along, across), -1)[None], persistent=False)
        position = torch.stack([along, across])[None] / unit
        gain = torch.ones(1, width + 2, 1, 1)
        gain[:, width:] = unit / 64.0  # positions become at most 1
        self.register_buffer("position", position, persistent=False)
        self.register_buffer("gain", gain, persistent=False)
        self.mix = nn.Conv2d(width + 2, width, 3, padding=1)
        self.gate, self.fresh = nn.Conv2d(2 * width, width, 3, padding=1), nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)
        self.memory: Tensor | None = None

    def forward(self, picture: Tensor) -> Tensor:
        """Scores [B, 128] of the cells."""
        ground = self.ground.expand(len(picture), -1, -1, -1)
        seen = F.grid_sample(self.camera(picture), ground, align_corners=False)
        placed = torch.cat([seen, self.position.expand(len(picture), -1, -1, -1)], 1)
        x = self.mix(placed * self.gain).relu()
        memory = torch.zeros_like(x) if self.memory is None else self.memory
        both = torch.cat([x, memory], 1)
        self.memory = memory + self.gate(both).sigmoid() * (self.fresh(both).tanh() - memory)
        return self.head(self.memory).flatten(1)


def build_model(epochs: int = 12, unit: float = 0.01, weights: str = "bev.pt") -> nn.Module:
    """The trained network, before its first frame: from the file `weights`, or trained in half a minute and written.

    The weights are the same for every `unit`: positions and gain are constants whose product does not change.
    """
    torch.manual_seed(0)
    model = Bev(unit=unit)
    if Path(weights).exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()
    pictures, cells = draw(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=epochs * 8)
    for _ in range(epochs):
        for index in torch.randperm(256).split(32):
            model.memory = None
            scores = torch.stack([model(pictures[index, t]) for t in range(FRAMES)], 1)
            loss = F.cross_entropy(scores.flatten(0, 1), cells[index].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.save(model.state_dict(), weights)
    model.memory = None
    return model.eval()


class Near:
    """Share of frames in which the best cell is the car's or touches it."""

    name, direction, bounds = "near", "maximize", (0.0, 1.0)

    def __call__(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One score for each frame, float32 [B]."""
        best, cell = outputs.argmax(1), batch[1]
        rows = (best // COLUMNS - cell // COLUMNS).abs()
        return ((rows <= 1) & ((best % COLUMNS - cell % COLUMNS).abs() <= 1)).float()
