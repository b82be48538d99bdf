"""Networks for the benchmarks: ResNet-20, ResNet-56, MobileNetV2 and a U-Net, with fixed seeds.

They have random weights and batch norm statistics of real activations (`revive`): with a gamma of zero or the initial
running variance a comparison of outputs would be meaningless. They are not trained, so they do not measure accuracy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions; the shortcut projects where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """He et al. 2015, section 4.2: three stages of `blocks` blocks (3: ResNet-20), 16-32-64 channels, for 3x32x32."""

    def __init__(self, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        plan = [(16, 16, 1)] * blocks
        plan += [(16, 32, 2)] + [(32, 32, 1)] * (blocks - 1) + [(32, 64, 2)] + [(64, 64, 1)] * (blocks - 1)
        self.blocks = nn.Sequential(*(Residual(*row) for row in plan))
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def conv_bn(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]


class Inverted(nn.Module):
    """Expand, depthwise, project; linear at the end, residual where the shape stays."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inside * expansion
        layers = [*conv_bn(inside, inner, 1), nn.ReLU6()] if expansion > 1 else []
        layers += [*conv_bn(inner, inner, 3, stride, inner), nn.ReLU6(), *conv_bn(inner, outside, 1)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class MobileNetV2(nn.Module):
    """Sandler et al. 2018, table 2, width 1.0."""

    ROWS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers, inside = [*conv_bn(3, 32, 3, 2), nn.ReLU6()], 32
        for expansion, outside, count, stride in self.ROWS:
            for i in range(count):
                layers.append(Inverted(inside, outside, stride if i == 0 else 1, expansion))
                inside = outside
        self.features = nn.Sequential(*layers, *conv_bn(inside, 1280, 1), nn.ReLU6())
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class Double(nn.Sequential):
    """Convolution, batch norm, ReLU, two times."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(*conv_bn(inside, outside, 3), nn.ReLU(), *conv_bn(outside, outside, 3), nn.ReLU())


class UNet(nn.Module):
    """Ronneberger et al. 2015 with padding: three levels, one up by transposed convolution, one bilinear."""

    def __init__(self, width: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.down1, self.down2 = Double(3, width), Double(width, 2 * width)
        self.deep = Double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2 = Double(4 * width, 2 * width)
        self.join1 = Double(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.up2(self.deep(F.max_pool2d(b, 2)))
        c = self.join2(torch.cat([b, c], dim=1))
        c = F.interpolate(c, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.join1(torch.cat([a, c], dim=1)))


def revive(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """`model` in eval mode with random affine parameters and the batch norm statistics of `images`."""
    generator = torch.Generator().manual_seed(seed)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5, generator=generator)
            norm.bias.normal_(0.0, 0.2, generator=generator)
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average: the statistics of these images alone
        model.train()(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def images(batch: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """Noise of two scales, smooth and white, with about unit variance: more like images than white noise."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    coarse = torch.randn(batch, channels, height // 8, width // 8, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + 0.3 * torch.randn(batch, *shape, generator=generator)) / 0.75


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "resnet20": (ResNet, (3, 32, 32), 32),
    "resnet56": (functools.partial(ResNet, 9), (3, 32, 32), 32),
    "mobilenetv2": (MobileNetV2, (3, 96, 96), 8),
    "unet": (UNet, (3, 64, 64), 8),
}
"""Name -> class, image shape, and batch size in the tables."""


def build(name: str, seed: int = 0) -> nn.Module:
    """The named network, revived, in eval mode."""
    make, shape, batch = NETWORKS[name]
    torch.manual_seed(seed)
    return revive(make(), images(batch, shape, seed + 1), seed)
