"""A ball that is often hidden: one frame alone does not show where it is, and the hidden map of a ConvGRU remembers.

The ball moves at constant speed over noise, is reflected at the walls, and is invisible in runs of one to three frames.
Images are 16x16, gray, float32 [1, 16, 16]; the target is the cell of 2x2 pixels that holds the ball, of 64. The model
keeps its hidden map in the attribute `hidden`, which is None before the first frame of a sequence (`cached_attrs`).
Nothing is stored: sequences are drawn, and the weights trained, when the task is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

Batch = tuple[Tensor, Tensor]  # image [B, 1, 16, 16], cell int64 [B]
SIZE, CELL = 16, 2
FRAMES = 10  # of each sequence
NOISE = 0.2  # standard deviation of a pixel; the ball is 1 at its centre
HELD_OUT, TRAINED = 96, 256  # sequences


class Sequences(TensorDataset):
    """Frames (image, cell) of sequences, one after another; `sequences` are their lengths."""

    def __init__(self, images: Tensor, cells: Tensor) -> None:
        """`images` [N, T, 1, 16, 16] and `cells` [N, T] of N sequences of T frames."""
        super().__init__(images.flatten(0, 1), cells.flatten())
        self.sequences = [images.shape[1]] * len(images)


@dataclass(frozen=True, kw_only=True)
class TemporalData:
    """Calibration sequences are a part of those that the model was trained on; evaluation sequences are others."""

    calibration: Sequences
    evaluation: Sequences


def build_data(*, calibration_size: int = 640, seed: int = 0) -> TemporalData:
    """Draw the sequences; `calibration_size` counts frames."""
    count = calibration_size // FRAMES
    if not 0 < count <= TRAINED:
        raise ValueError(
            f"calibration_size must lie in {FRAMES}..{TRAINED * FRAMES}, whole sequences of {FRAMES} frames; "
            f"got {calibration_size}."
        )
    images, cells = draw(HELD_OUT + TRAINED, seed)
    return TemporalData(
        calibration=Sequences(images[HELD_OUT:][:count], cells[HELD_OUT:][:count]),
        evaluation=Sequences(images[:HELD_OUT], cells[:HELD_OUT]),
    )


def draw(count: int, seed: int, frames: int = FRAMES) -> tuple[Tensor, Tensor]:
    """Images [count, frames, 1, 16, 16] and cells [count, frames]; the first two frames always show the ball."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(count, 1, 2, generator=generator) * (SIZE - 1)
    angle = torch.rand(count, 1, generator=generator) * 2 * torch.pi
    speed = 1.0 + torch.rand(count, 1, generator=generator)
    step = torch.stack([angle.cos() * speed, angle.sin() * speed], -1)
    place = start + step * torch.arange(frames)[:, None]
    place = (SIZE - 1) - ((place % (2 * (SIZE - 1))) - (SIZE - 1)).abs()  # reflected at both walls
    shown = torch.ones(count, frames, dtype=torch.bool)
    t = torch.full((count,), 2)
    while bool((t < frames).any()):  # by turns hidden for one to three frames and shown for one or two
        hidden = torch.randint(1, 4, (count,), generator=generator)
        frame = torch.arange(frames)
        shown &= ~((frame >= t[:, None]) & (frame < (t + hidden)[:, None]))
        t = t + hidden + torch.randint(1, 3, (count,), generator=generator)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    square = (x - place[..., 0, None, None]) ** 2 + (y - place[..., 1, None, None]) ** 2
    ball = torch.exp(-square / 2) * shown[..., None, None]
    images = ball + NOISE * torch.randn(ball.shape, generator=generator)
    cells = (place[..., 1] // CELL * (SIZE // CELL) + place[..., 0] // CELL).long()
    return images[:, :, None], cells


class Tracker(nn.Module):
    """A convolution, a ConvGRU whose hidden map stays on the module, and a score for each cell."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 4, CELL, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.gates = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.fresh = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 1)
        self.hidden: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        """Scores [B, 64] of the cells."""
        x = self.relu(self.norm(self.stem(image)))
        h = torch.zeros_like(x) if self.hidden is None else self.hidden
        reset, update = self.gates(torch.cat([x, h], 1)).sigmoid().chunk(2, 1)
        fresh = self.fresh(torch.cat([x, reset * h], 1)).tanh()
        self.hidden = h + update * (fresh - h)
        scores: Tensor = self.head(self.hidden).flatten(1)
        return scores


def build_model(*, epochs: int = 10, seed: int = 0) -> nn.Module:
    """Train the float network along the sequences in a few seconds; in eval mode, before its first frame."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # repeatable, and the network is too small for threads
    try:
        return _trained(epochs, seed)
    finally:
        torch.set_num_threads(threads)


def _trained(epochs: int, seed: int) -> nn.Module:
    images, cells = (part[HELD_OUT:] for part in draw(HELD_OUT + TRAINED, 0))
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = Tracker()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * 8) if epochs else None
        for _ in range(epochs):
            for index in torch.split(torch.randperm(TRAINED), TRAINED // 8):
                model.hidden = None
                scores = torch.stack([model(images[index, t]) for t in range(FRAMES)], 1)
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(scores.flatten(0, 1), cells[index].flatten()))
                optimizer.step()
                if schedule is not None:
                    schedule.step()
    model.hidden = None
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class Hit:
    """Share of frames in which the best cell is the ball's or touches it."""

    name: ClassVar[str] = "hit"
    direction: ClassVar[str] = "maximize"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __call__(self, outputs: Tensor, batch: Batch) -> Tensor:
        """One score per frame, float32 [B]: 1 hit, 0 missed."""
        found, wanted = (torch.stack([c // (SIZE // CELL), c % (SIZE // CELL)]) for c in (outputs.argmax(1), batch[1]))
        return ((found - wanted).abs().amax(0) <= 1).float()
