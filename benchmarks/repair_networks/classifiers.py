"""Small classifiers of gray 28x28 images: depthwise networks with ReLU6 and with SiLU, and a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_norm(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias, batch norm."""
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outside)]


class Squeeze(nn.Module):
    """Squeeze and excitation: each channel times a gate of all channel means."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(torch.nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Inverted(nn.Module):
    """Expand, depthwise, project; linear at the end, residual where the shape stays."""

    def __init__(
        self,
        inside: int,
        outside: int,
        stride: int,
        expansion: int,
        kernel: int,
        activation: type[nn.Module],
        gated: bool,
    ) -> None:
        super().__init__()
        inner = inside * expansion
        layers = [*conv_norm(inside, inner, 1), activation()] if expansion > 1 else []
        layers += [*conv_norm(inner, inner, kernel, stride, inner), activation()]
        layers += [Squeeze(inner, max(inside // 4, 4))] if gated else []
        self.body = nn.Sequential(*layers, *conv_norm(inner, outside, 1))
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Depthwise(nn.Module):
    """A stem, inverted residual blocks, a wide 1x1 convolution and a dense layer; `rows` are (expansion, channels,
    blocks, stride, kernel) of each stage.
    """

    def __init__(
        self, rows: tuple[tuple[int, int, int, int, int], ...], activation: type[nn.Module], gated: bool
    ) -> None:
        super().__init__()
        inside = 16
        layers: list[nn.Module] = [*conv_norm(1, inside, 3, 2), activation()]
        for expansion, outside, count, stride, kernel in rows:
            for i in range(count):
                layers.append(Inverted(inside, outside, stride if i == 0 else 1, expansion, kernel, activation, gated))
                inside = outside
        self.features = nn.Sequential(*layers, *conv_norm(inside, 128, 1), activation())
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def mobilenet() -> nn.Module:
    """A narrow MobileNetV2 (Sandler et al. 2018): depthwise, ReLU6."""
    rows = ((1, 16, 1, 1, 3), (4, 24, 2, 1, 3), (4, 32, 2, 2, 3), (4, 48, 2, 2, 3))
    return Depthwise(rows, nn.ReLU6, gated=False)


def efficientnet() -> nn.Module:
    """A narrow EfficientNet (Tan and Le 2019): depthwise with kernels of 3 and 5, SiLU, squeeze and excitation."""
    rows = ((1, 16, 1, 1, 3), (4, 24, 2, 1, 3), (4, 32, 2, 2, 5), (4, 48, 2, 2, 5))
    return Depthwise(rows, nn.SiLU, gated=True)


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    """Layer norm and attention, layer norm and two linear layers, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al. 2021 with 49 patches of 4x4, four layers of width 64, and the mean of all tokens."""

    def __init__(self, width: int = 64, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(x)).mean(1))


@torch.no_grad()
def with_outliers(model: VisionTransformer, channels: int = 3, factor: float = 64.0) -> VisionTransformer:
    """Multiply `channels` channels of each layer norm by `factor` and divide the columns that read them by it.

    The float function stays the same bit for bit, because the factor is a power of two. Trained transformers have such
    channels by themselves (Bondarenko et al. 2021).
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        for norm, reader in ((layer.norm1, layer.attention.qkv), (layer.norm2, layer.mlp[0])):
            chosen = torch.randperm(len(norm.weight), generator=generator)[:channels]
            norm.weight[chosen] *= factor
            norm.bias[chosen] *= factor
            reader.weight[:, chosen] /= factor
    return model
