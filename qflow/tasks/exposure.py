"""Digits in light that varies by 1000:1: all-int16 misses the float accuracy, three fp16 operators reach it.

Every image is multiplied by a gain of its own. The network divides it out with a hand-written RMS norm, as found in
heads of BEV and DETR models. Features span 1000:1, which int16 can represent; their squares span 1,000,000:1, and those
of dark images become 0 at int16. So `level[square]`, `level[mean]` and `level[add]` all need fp16; everything after the
norm can be int8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from qflow.tasks import digits
from qflow.tasks.digits import DigitsData

SPAN = 1000.0  # brightest over darkest gain
EPS = 1e-6  # below the mean square of features in the darkest image, and representable in fp16


def build_data(*, calibration_size: int = 128, seed: int = 0, span: float = SPAN) -> DigitsData:
    """The digits, each image times a gain drawn log-uniformly from 1 / sqrt(span) to sqrt(span)."""
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
        # The bound changes nothing in float; it applies where quantization has rounded the energy to 0.
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
    """Train the float network in about a second; returned in eval mode. The global random state does not change."""
    return digits.fit(ExposureNet, build_data().train, epochs=epochs, seed=seed)
