"""Digits under light of 1000:1, where all-int16 misses the float accuracy and three fp16 operators reach it.

Every picture has a gain of its own, and the network divides it out with an RMS norm written by hand, as heads of BEV
and DETR models have. Features span 1000:1, which int16 holds; their squares span 1,000,000:1, and at int16 those of
dark pictures become 0. So `level[square]`, `level[mean]` and `level[add]` need fp16, all three; everything behind the
norm can be int8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qflow.tasks import digits
from qflow.tasks.digits import DigitsData

SPAN = 1000.0  # brightest over darkest gain
EPS = 1e-6  # below the mean square of what the darkest picture shows, and a value that fp16 holds


def build_data(*, calibration_size: int = 128, seed: int = 0, span: float = SPAN) -> DigitsData:
    """The digits, each picture times a gain drawn log-uniformly from 1 / sqrt(span) to sqrt(span)."""
    data = digits.build_data(calibration_size=calibration_size, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    train, evaluation = (_exposed(split, span, generator) for split in (data.train, data.evaluation))
    calibration = TensorDataset(*(part[:calibration_size] for part in train.tensors))
    return DigitsData(train=train, calibration=calibration, evaluation=evaluation)


def _exposed(split: TensorDataset, span: float, generator: torch.Generator) -> TensorDataset:
    images, labels = split.tensors
    exponent = torch.rand(len(labels), 1, 1, 1, generator=generator) - 0.5
    return TensorDataset(images * span**exponent, labels)


class Level(nn.Module):
    """RMS norm over the channels of each pixel, operator by operator."""

    def forward(self, x: Tensor) -> Tensor:
        energy = x.square().mean(1, keepdim=True) + EPS
        # The bound changes nothing in float: it is for an energy that quantization has made 0.
        return x * energy.rsqrt().clamp_max(EPS**-0.5)


class ExposureNet(nn.Module):
    """A convolution that keeps the gain (no bias, no norm), `Level`, and the rest of the digits network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.level = Level()
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.dense = nn.Linear(32 * 4 * 4, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.level(self.relu(self.conv1(image)))
        x = x + self.relu(self.norm2(self.conv2(x)))
        x = self.relu(self.norm3(self.conv3(x)))
        scores: Tensor = self.dense(x.flatten(1))
        return scores


def build_model(*, epochs: int = 8, seed: int = 0) -> nn.Module:
    """Train the float network, about a second, and give it in eval mode. No random state is disturbed."""
    return digits.fit(ExposureNet, build_data().train, epochs=epochs, seed=seed)
