"""A small dense detector similar to YOLO: backbone, neck, and one grid of cells, each with a box and scores.

It is written like any float model, without regard to quantization: plain torch.nn, batch norm, SiLU, residual adds,
concatenation, nearest upsampling. It is fully convolutional and takes any image whose sides are multiples of 16.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

STRIDE = 8  # pixels per cell, in both outputs
WEIGHTS = Path(__file__).with_name("weights.safetensors")


class ConvBlock(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.conv(x)))
        return y


class Bottleneck(nn.Module):
    """Two 3x3 blocks with a residual connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = ConvBlock(channels, channels)
        self.second = ConvBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return x + y


class Stage(nn.Module):
    """Cross-stage block (C2f): a chain of bottlenecks on half the channels, all its links concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        half = outputs // 2
        self.aside = ConvBlock(inputs, half, kernel=1)
        self.along = ConvBlock(inputs, half, kernel=1)
        self.chain = nn.ModuleList(Bottleneck(half) for _ in range(depth))
        self.merge = ConvBlock((2 + depth) * half, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        links = [self.aside(x), self.along(x)]
        for bottleneck in self.chain:
            links.append(bottleneck(links[-1]))
        y: Tensor = self.merge(torch.cat(links, dim=1))
        return y


def head_conv(inputs: int, outputs: int, bias: float) -> nn.Conv2d:
    """1x1 convolution whose outputs are close to `bias` before training."""
    conv = nn.Conv2d(inputs, outputs, 1)
    nn.init.constant_(cast(Tensor, conv.bias), bias)
    return conv


class Detector(nn.Module):
    """Scores [B, classes, H/8, W/8] (logits) and boxes [B, 4, H/8, W/8] of an image [B, 3, H, W] in [0, 1].

    A box is given by the distances from the cell's centre to its left, top, right and bottom side, in cells.
    """

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        """Build for `classes`; `width` is the channel count after the first convolution."""
        super().__init__()
        w2, w3, w4 = 2 * width, 3 * width, 6 * width
        self.stem = nn.Sequential(ConvBlock(3, width, stride=2), ConvBlock(width, w2, stride=2))
        self.stage4 = Stage(w2, w2, depth=1)
        self.stage8 = nn.Sequential(ConvBlock(w2, w3, stride=2), Stage(w3, w3, depth=2))
        self.stage16 = nn.Sequential(ConvBlock(w3, w4, stride=2), Stage(w4, w4, depth=2))
        self.lateral = ConvBlock(w4, w3, kernel=1)
        self.neck = Stage(2 * w3, w3, depth=1)
        self.score_head = nn.Sequential(ConvBlock(w3, w3), head_conv(w3, classes, bias=-4.6))  # 1 cell in 100
        self.box_head = nn.Sequential(ConvBlock(w3, w3), head_conv(w3, 4, bias=2.0))  # four cells wide and high

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stage8(self.stage4(self.stem(image)))
        coarse = self.lateral(self.stage16(fine))
        merged = self.neck(torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest"), fine], dim=1))
        return self.score_head(merged), self.box_head(merged)


def build_model(*, weights: Path | str | None = WEIGHTS) -> nn.Module:
    """The float detector in eval mode, with the shipped weights by default; None: untrained."""
    model = Detector()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    return model.eval()
