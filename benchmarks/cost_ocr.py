"""PP-OCRv6's medium recognizer, written from the public architecture: PPLCNetV4, a light SVTR neck, the CTC head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cost_networks import unit


class Attention(nn.Module):
    """Attention of several heads over [B, N, C]; the keys are those of `other`, [B, M, C], if it is given."""

    def __init__(self, width: int, heads: int) -> None:
        """Make random weights."""
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Attend from `x` to `other`, or to itself."""
        source = x if other is None else other
        query, key, value = (self._split(y) for y in (self.query(x), self.key(source), self.value(source)))
        weights = F.softmax(query @ key.transpose(-2, -1) * self.scale, dim=-1)
        return self.out((weights @ value).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Mixer(nn.Module):
    """Block of PPLCNetV4: depthwise convolution, channel gate where `gated`, and a bottleneck of twice the width."""

    def __init__(self, cin: int, cout: int, stride: tuple[int, int] = (1, 1), gated: bool = False) -> None:
        """Make random weights."""
        super().__init__()
        self.residual, self.gated = cin == cout and stride == (1, 1), gated
        self.depthwise = nn.Conv2d(cin, cin, 3, stride, 1, groups=cin)
        if gated:
            squeeze = [nn.AdaptiveAvgPool2d(1), nn.Conv2d(cin, cin // 4, 1), nn.ReLU(), nn.Conv2d(cin // 4, cin, 1)]
            self.gate = nn.Sequential(*squeeze, nn.Hardsigmoid())
        self.mix = nn.Sequential(unit(cin, 2 * cin, 1, act=nn.GELU()), unit(2 * cin, cout, 1, act=nn.Identity()))

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions, then channels."""
        x = self.depthwise(x)
        x = x * self.gate(x) if self.gated else x
        return x + self.mix(x) if self.residual else self.mix(x)


class Stem(nn.Module):
    """To a quarter of the size, with a pool beside two small convolutions."""

    def __init__(self, mid: int, out: int) -> None:
        """Make random weights."""
        super().__init__()
        self.first, self.pool = unit(3, mid, stride=2), nn.MaxPool2d(2, 1)
        self.narrow, self.widen = self._two(mid, mid // 2), self._two(mid // 2, mid)
        self.join = nn.Sequential(unit(2 * mid, mid, stride=2), unit(mid, out, 1))

    @staticmethod
    def _two(cin: int, cout: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(cin, cout, 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Stride 4."""
        x = F.pad(self.first(x), (0, 1, 0, 1))
        side = self.widen(F.pad(self.narrow(x), (0, 1, 0, 1)))
        return self.join(torch.cat([self.pool(x), side], 1))


class Layer(nn.Module):
    """Transformer layer: attention and two linear layers with SiLU, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        """Make random weights."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = Attention(width, heads)
        self.feed = nn.Sequential(nn.Linear(width, ratio * width), nn.SiLU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to the same."""
        x = x + self.attention(self.norms[0](x))
        return x + self.feed(self.norms[1](x))


class Recognizer(nn.Module):
    """The medium recognizer: text of 48 pixels' height to 18710 classes for each 8 pixels."""

    def __init__(self, classes: int = 18710, width: int = 192) -> None:
        """Make random weights."""
        super().__init__()
        down = (2, 1)
        second = [Mixer(128, 256), Mixer(256, 256), Mixer(256, 256, gated=True)]
        third = [Mixer(256, 512, down), *(Mixer(512, 512, gated=i % 2 == 0) for i in range(6))]
        fourth = [Mixer(512, 768, down), Mixer(768, 768, gated=True), Mixer(768, 768)]
        self.backbone = nn.Sequential(Stem(64, 128), Mixer(128, 128, gated=True), *second, *third, *fourth)
        self.pool = nn.AvgPool2d((3, 2))
        self.skip, self.reduce = unit(768, width, 1, act=nn.SiLU()), unit(768, width, 1, act=nn.SiLU())
        row = nn.Conv2d(width, width, (1, 7), padding=(0, 3), groups=width, bias=False)
        self.local = nn.Sequential(row, nn.BatchNorm2d(width), nn.SiLU())
        self.layers = nn.Sequential(Layer(width, 8, 4), Layer(width, 8, 4), nn.LayerNorm(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Shares of the classes, [B, N, classes], of images [B, 3, 48, W]."""
        x = self.pool(self.backbone(x))
        y = self.reduce(x)
        y = self.layers((y + self.local(y)).flatten(2).transpose(1, 2))
        y = y + self.skip(x).flatten(2).transpose(1, 2)
        return F.softmax(self.head(y), dim=2)
