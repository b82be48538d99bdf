"""Networks that others published board times of, written from their papers' code: XFeat, PIDNet-S and YOLOP.

They are held out: no row of the fit, and no price, was chosen by their times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(cin: int, cout: int, kernel: int = 3, stride: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    """Convolution, batch norm and an activation (ReLU)."""
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), act or nn.ReLU())


class XFeat(nn.Module):
    """Accelerated features (CVPR 2024): a map of keypoints, one of their reliability, and 64 features at an eighth.

    Its publisher normalizes the grey image before the network (on the CPU).
    """

    def __init__(self) -> None:
        """Make random weights."""
        super().__init__()
        self.skip = nn.Sequential(nn.AvgPool2d(4, 4), nn.Conv2d(1, 24, 1))
        self.block1 = nn.Sequential(unit(1, 4), unit(4, 8, stride=2), unit(8, 8), unit(8, 24, stride=2))
        self.block2 = nn.Sequential(unit(24, 24), unit(24, 24))
        self.block3 = nn.Sequential(unit(24, 64, stride=2), unit(64, 64), unit(64, 64, 1))
        self.block4 = nn.Sequential(unit(64, 64, stride=2), unit(64, 64), unit(64, 64))
        self.block5 = nn.Sequential(unit(64, 128, stride=2), unit(128, 128), unit(128, 128), unit(128, 64, 1))
        self.fusion = nn.Sequential(unit(64, 64), unit(64, 64), nn.Conv2d(64, 64, 1))
        self.heat = nn.Sequential(unit(64, 64, 1), unit(64, 64, 1), nn.Conv2d(64, 1, 1), nn.Sigmoid())
        self.keypoints = nn.Sequential(unit(64, 64, 1), unit(64, 64, 1), unit(64, 64, 1), nn.Conv2d(64, 65, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, keypoints and reliability of a normalized grey image."""
        third = self.block3(self.block2(self.block1(x) + self.skip(x)))
        fourth = self.block4(third)
        fifth = self.block5(fourth)
        size = third.shape[-2:]
        fourth, fifth = (F.interpolate(t, size, mode="bilinear", align_corners=False) for t in (fourth, fifth))
        features = self.fusion(third + fourth + fifth)
        cells = F.pixel_unshuffle(x, 8)
        return features, self.keypoints(cells), self.heat(features)


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or with `wide` 1x1, 3x3, 1x1 to twice the channels; ReLU after unless
    `last`.
    """

    def __init__(self, cin: int, cout: int, stride: int = 1, wide: bool = False, last: bool = False) -> None:
        """Make random weights."""
        super().__init__()
        out = 2 * cout if wide else cout
        none = nn.Identity()
        if wide:
            self.body = nn.Sequential(unit(cin, cout, 1), unit(cout, cout, 3, stride), unit(cout, out, 1, act=none))
        else:
            self.body = nn.Sequential(unit(cin, cout, 3, stride), unit(cout, out, 3, act=none))
        self.side = unit(cin, out, 1, stride, act=none) if stride > 1 or cin != out else none
        self.act = none if last else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add the body to the side."""
        return self.act(self.body(x) + self.side(x))


def blocks(cin: int, cout: int, count: int, stride: int = 1) -> nn.Sequential:
    """Residual blocks, the last one without a ReLU."""
    rest = [Block(cout, cout, last=i == count - 2) for i in range(count - 1)]
    return nn.Sequential(Block(cin, cout, stride), *rest)


class Attend(nn.Module):
    """Pixel attention of PIDNet: mixes two maps by the similarity of their projections."""

    def __init__(self, channels: int, mid: int) -> None:
        """Make random weights."""
        super().__init__()
        none = nn.Identity()
        self.x, self.y = unit(channels, mid, 1, act=none), unit(channels, mid, 1, act=none)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Mix `x` with `y`, which is smaller."""
        size = x.shape[-2:]
        near = F.interpolate(self.y(y), size, mode="bilinear", align_corners=False)
        share = torch.sigmoid((self.x(x) * near).sum(1, keepdim=True))
        return (1 - share) * x + share * F.interpolate(y, size, mode="bilinear", align_corners=False)


class Pyramid(nn.Module):
    """The parallel pooling pyramid of PIDNet."""

    def __init__(self, cin: int, mid: int, cout: int) -> None:
        """Make random weights."""
        super().__init__()
        pools = [nn.AvgPool2d(5, 2, 2), nn.AvgPool2d(9, 4, 4), nn.AvgPool2d(17, 8, 8), nn.AdaptiveAvgPool2d(1)]
        self.scales = nn.ModuleList(
            nn.Sequential(pool, nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, mid, 1, bias=False)) for pool in pools
        )
        self.plain = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, mid, 1, bias=False))
        self.process = nn.Sequential(
            nn.BatchNorm2d(4 * mid), nn.ReLU(), nn.Conv2d(4 * mid, 4 * mid, 3, 1, 1, groups=4, bias=False)
        )
        self.compress = nn.Sequential(nn.BatchNorm2d(5 * mid), nn.ReLU(), nn.Conv2d(5 * mid, cout, 1, bias=False))
        self.short = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU(), nn.Conv2d(cin, cout, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Pool at four scales and join."""
        size, plain = x.shape[-2:], self.plain(x)
        pooled = [F.interpolate(s(x), size, mode="bilinear", align_corners=False) + plain for s in self.scales]
        return self.compress(torch.cat([plain, self.process(torch.cat(pooled, 1))], 1)) + self.short(x)


class PIDNet(nn.Module):
    """PIDNet-S (CVPR 2023) at inference: 19 classes at an eighth of the size, as its publisher measured it."""

    def __init__(self) -> None:
        """Make random weights."""
        super().__init__()
        none = nn.Identity()
        self.stem = nn.Sequential(unit(3, 32, 3, 2), unit(32, 32, 3, 2), blocks(32, 32, 2), nn.ReLU())
        self.layer2 = nn.Sequential(blocks(32, 64, 2, 2), nn.ReLU())
        self.layer3, self.layer4 = blocks(64, 128, 3, 2), blocks(128, 256, 3, 2)
        self.layer5 = nn.Sequential(Block(256, 256, 2, wide=True), Block(512, 256, wide=True, last=True))
        self.p3, self.p4, self.p5 = blocks(64, 64, 2), blocks(64, 64, 2), Block(64, 64, wide=True, last=True)
        self.down3, self.down4 = unit(128, 64, 1, act=none), unit(256, 64, 1, act=none)
        self.mix3, self.mix4 = Attend(64, 32), Attend(64, 32)
        self.d3, self.d4 = Block(64, 32, last=True), Block(32, 32, wide=True, last=True)
        self.d5 = Block(64, 64, wide=True, last=True)
        self.edge3, self.edge4 = unit(128, 32, 3, act=none), unit(256, 64, 3, act=none)
        self.pyramid = Pyramid(512, 96, 128)
        self.fine, self.coarse = unit(128, 128, 1, act=none), unit(128, 128, 1, act=none)
        self.head = nn.Sequential(nn.BatchNorm2d(128), nn.ReLU(), unit(128, 128), nn.Conv2d(128, 19, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scores of 19 classes."""
        x = self.layer2(self.stem(x))
        size = x.shape[-2:]
        p, d = self.p3(x), self.d3(x)
        x = F.relu(self.layer3(x))
        p = self.mix3(p, self.down3(x))
        d = d + F.interpolate(self.edge3(x), size, mode="bilinear", align_corners=False)
        x = F.relu(self.layer4(x))
        p, d = self.p4(F.relu(p)), self.d4(F.relu(d))
        p = self.mix4(p, self.down4(x))
        d = d + F.interpolate(self.edge4(x), size, mode="bilinear", align_corners=False)
        p, d = self.p5(F.relu(p)), self.d5(F.relu(d))
        x = F.interpolate(self.pyramid(self.layer5(x)), size, mode="bilinear", align_corners=False)
        edge = torch.sigmoid(d)
        return self.head(self.fine((1 - edge) * x + p) + self.coarse(x + edge * p))


class Csp(nn.Module):
    """The cross-stage block of YOLOP."""

    def __init__(self, cin: int, cout: int, count: int, residual: bool = True) -> None:
        """Make random weights."""
        super().__init__()
        mid, self.residual = cout // 2, residual
        self.first = hard(cin, mid, 1)
        self.steps = nn.ModuleList(nn.Sequential(hard(mid, mid, 1), hard(mid, mid)) for _ in range(count))
        self.left, self.right = nn.Conv2d(mid, mid, 1, bias=False), nn.Conv2d(cin, mid, 1, bias=False)
        self.norm, self.last = nn.Sequential(nn.BatchNorm2d(2 * mid), nn.LeakyReLU(0.1)), hard(2 * mid, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Join the bottlenecks with the bypass."""
        y = self.first(x)
        for step in self.steps:
            y = y + step(y) if self.residual else step(y)
        return self.last(self.norm(torch.cat([self.left(y), self.right(x)], 1)))


def hard(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """`unit` with a hard swish."""
    return unit(cin, cout, kernel, stride, nn.Hardswish())


class Yolop(nn.Module):
    """YOLOP (2021): detection, drivable area and lane lines."""

    def __init__(self) -> None:
        """Make random weights."""
        super().__init__()
        self.stem = nn.Sequential(hard(12, 32), hard(32, 64, 3, 2), Csp(64, 64, 1), hard(64, 128, 3, 2))
        self.c3 = Csp(128, 128, 3)
        self.c4 = nn.Sequential(hard(128, 256, 3, 2), Csp(256, 256, 3))
        self.c5 = hard(256, 512, 3, 2)
        self.spp = nn.ModuleList([hard(512, 256, 1), hard(1024, 512, 1)])
        self.top = nn.Sequential(Csp(512, 512, 1, False), hard(512, 256, 1))
        self.mid = nn.Sequential(Csp(512, 256, 1, False), hard(256, 128, 1))
        self.n3, self.n4, self.n5 = Csp(256, 128, 1, False), Csp(256, 256, 1, False), Csp(512, 512, 1, False)
        self.d3, self.d4 = hard(128, 128, 3, 2), hard(256, 256, 3, 2)
        self.detect = nn.ModuleList(nn.Conv2d(c, 18, 1) for c in (128, 256, 512))
        self.segment = nn.ModuleList(self._segmentation() for _ in range(2))

    @staticmethod
    def _segmentation() -> nn.Sequential:
        up = nn.Upsample(scale_factor=2, mode="nearest")
        first = [hard(256, 128), up, Csp(128, 64, 1, False), hard(64, 32), up]
        return nn.Sequential(*first, hard(32, 16), Csp(16, 8, 1, False), up, hard(8, 2), nn.Sigmoid())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Three maps of boxes and two masks."""
        c3 = self.c3(self.stem(F.pixel_unshuffle(x, 2)))
        c4 = self.c4(c3)
        y = self.spp[0](self.c5(c4))
        y = self.spp[1](torch.cat([y, *(F.max_pool2d(y, k, 1, k // 2) for k in (5, 9, 13))], 1))
        top = self.top(y)
        mid = self.mid(torch.cat([F.interpolate(top, scale_factor=2.0), c4], 1))
        low = torch.cat([F.interpolate(mid, scale_factor=2.0), c3], 1)
        n3 = self.n3(low)
        n4 = self.n4(torch.cat([self.d3(n3), mid], 1))
        n5 = self.n5(torch.cat([self.d4(n4), top], 1))
        boxes = [head(n) for head, n in zip(self.detect, (n3, n4, n5), strict=True)]
        return [*boxes, *(segment(low) for segment in self.segment)]
