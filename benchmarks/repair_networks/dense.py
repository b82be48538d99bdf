"""A depthwise detector for the pictures of the built-in task `perception`, and a segmentation network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.repair_networks.classifiers import conv_norm


class Separable(nn.Module):
    """Depthwise 3x3 and 1x1 convolution, each with batch norm and ReLU; residual where the shape stays."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(*conv_norm(inside, inside, 3, stride, inside), nn.ReLU())
        self.pointwise = nn.Sequential(*conv_norm(inside, outside, 1), nn.ReLU())
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(self.depthwise(x))
        return x + y if self.residual else y


class DepthwiseDetector(nn.Module):
    """Scores [B, 5, H/8, W/8] (logits) and distances [B, 4, H/8, W/8], as those of the built-in detector."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, 16, 3, 2), nn.ReLU())
        self.fine = nn.Sequential(Separable(16, 32, 2), Separable(32, 32), Separable(32, 64, 2), Separable(64, 64))
        self.coarse = nn.Sequential(Separable(64, 96, 2), Separable(96, 96), Separable(96, 96))
        self.lateral = nn.Sequential(*conv_norm(96, 64, 1), nn.ReLU())
        self.neck = nn.Sequential(Separable(128, 64), Separable(64, 64))
        self.scores, self.boxes = nn.Conv2d(64, 5, 1), nn.Conv2d(64, 4, 1)
        nn.init.constant_(self.scores.bias, -4.6)  # type: ignore[arg-type]  # one cell in a hundred holds an item
        nn.init.constant_(self.boxes.bias, 2.0)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(image))
        coarse = F.interpolate(self.lateral(self.coarse(fine)), scale_factor=2.0, mode="nearest")
        merged = self.neck(torch.cat([fine, coarse], dim=1))
        return self.scores(merged), self.boxes(merged)


def double(inside: int, outside: int) -> nn.Sequential:
    """Two times convolution, batch norm, ReLU."""
    return nn.Sequential(*conv_norm(inside, outside, 3), nn.ReLU(), *conv_norm(outside, outside, 3), nn.ReLU())


class SegmentationNet(nn.Module):
    """A U-Net (Ronneberger et al. 2015) with two levels, one up by transposed convolution, one bilinear: logits
    [B, 6, H, W] of the ground and five kinds of items.
    """

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_norm(1, width, 3), nn.ReLU())
        self.down1, self.down2 = double(width, 2 * width), double(2 * width, 4 * width)
        self.up = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join1 = double(4 * width, 2 * width)
        self.join2 = nn.Sequential(*conv_norm(3 * width, width, 3), nn.ReLU())
        self.head = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.down1(F.max_pool2d(a, 2))
        c = self.up(self.down2(F.max_pool2d(b, 2)))
        c = F.interpolate(self.join1(torch.cat([b, c], 1)), scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.join2(torch.cat([a, c], 1)))
