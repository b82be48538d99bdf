"""Small models as users write them, each with what makes it hard for a tracer."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Residual block with an in-place ReLU behind the add."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class ResNet(nn.Module):
    """Residual, functional pooling, a view, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True))
        self.blocks = nn.ModuleList(Block(8) for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class UNet(nn.Module):
    """Skip with concat, transposed conv with batch norm, interpolate, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, groups=8), nn.GELU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x):
        a = self.down(x)
        b = torch.relu(self.bn(self.up(self.deep(a))))
        y = self.out(torch.cat([a, b], dim=1))
        return {"map": F.interpolate(y, scale_factor=2.0, mode="bilinear"), "score": y.sigmoid()}


class Attention(nn.Module):
    """Matmuls, softmax, layer norm, a parameter used as a tensor, operator forms."""

    def __init__(self, width=16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.position = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        x = x + self.position
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2) / 4.0, dim=-1)
        return x - self.proj(weights @ v)


class Shared(nn.Module):
    """One convolution called twice, a module never called, a loop over a shape."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.never = nn.Linear(2, 2)

    def forward(self, x):
        for _ in range(x.shape[1] // 2):
            x = self.bn(self.conv(x))
        return x * 2.0


class TwoInputs(nn.Module):
    """Two named inputs, one of them an index, a tuple of outputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 1)
        self.grid = nn.Conv2d(3, 2, 1)

    def forward(self, image, points):
        sampled = F.grid_sample(self.embed(image), points, align_corners=False)
        return sampled, (self.grid(image), sampled.amax(dim=(2, 3)))


class Wide(nn.Module):
    """`loud` carries one channel 200 times as large as the rest; `quiet` takes it back: float is unchanged."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.loud, self.quiet = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1)
        with torch.no_grad():
            self.loud.weight.copy_(torch.tensor([200.0, 1.0]).view(2, 1, 1, 1))
            self.quiet.weight.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1, 1))
            self.loud.bias.zero_()
            self.quiet.bias.zero_()

    def forward(self, image):
        return self.inner(self.quiet(self.loud(image)))


class WritesByStrides(nn.Module):
    """The first channels are changed where they lie, through a view that is defined by its place in memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.a(x)
        x.as_strided((len(x), 2), (x.stride(0), x.stride(1))).mul_(0.5)
        return self.b(x)


def revive(model, seed=0):
    """Weights and statistics that are alive: an equality test on zeros would say nothing."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator) * 0.3)
    return model.eval()


def zoo():
    """Name -> (model, example inputs at batch 2)."""
    torch.manual_seed(0)
    image = torch.randn(2, 3, 16, 16)
    points = torch.rand(2, 5, 5, 2) * 2 - 1
    return {
        "resnet": (revive(ResNet()), image),
        "unet": (revive(UNet()), image),
        "attention": (revive(Attention()), torch.randn(2, 4, 16)),
        "shared": (revive(Shared()), torch.randn(2, 4, 8, 8)),
        "two_inputs": (revive(TwoInputs()), {"image": image, "points": points}),
    }
