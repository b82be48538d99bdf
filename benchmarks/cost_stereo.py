"""LAS2-M (Lite Any Stereo V2), written from the public architecture and with the shifts that its publisher exported."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cost_networks import unit


class Partial(nn.Module):
    """FasterNet's block: a convolution of a quarter of the channels, two 1x1 convolutions, and a residual."""

    def __init__(self, width: int, ratio: int) -> None:
        """Make random weights."""
        super().__init__()
        self.sizes = [width // 4, width - width // 4]
        self.conv = nn.Conv2d(width // 4, width // 4, 3, 1, 1, bias=False)
        self.mix = nn.Sequential(
            unit(width, ratio * width, 1, act=nn.GELU()), nn.Conv2d(ratio * width, width, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Keep the size."""
        first, rest = torch.split(x, self.sizes, dim=1)
        return x + self.mix(torch.cat([self.conv(first), rest], 1))


def down(cin: int, cout: int, kernel: int) -> nn.Sequential:
    """Convolution without overlap, to 1 / kernel of the size."""
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, kernel, bias=False), nn.BatchNorm2d(cout))


def up(cin: int, cout: int, kernel: int = 4) -> list[nn.Module]:
    """Transposed convolution to twice the size, and a batch norm."""
    return [nn.ConvTranspose2d(cin, cout, kernel, 2, 1, kernel % 2, bias=False), nn.BatchNorm2d(cout)]


class Join(nn.Module):
    """Bring a small map to twice its size and join it with a larger one."""

    def __init__(self, low: int, high: int) -> None:
        """Make random weights."""
        super().__init__()
        self.up, self.conv = (
            nn.Sequential(*up(low, high), nn.LeakyReLU(0.2)),
            unit(2 * high, high, act=nn.LeakyReLU(0.2)),
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        """At the size of `high`."""
        return self.conv(torch.cat([high, self.up(low)], 1))


class Features(nn.Module):
    """FasterNet-T0 and a pyramid: maps of 40, 80 and 160 channels at a quarter, an eighth and a sixteenth."""

    def __init__(self) -> None:
        """Make random weights."""
        super().__init__()
        widths, depths = (40, 80, 160, 320), (1, 2, 8, 2)
        first = [down(3, 40, 4), *(down(w, 2 * w, 2) for w in widths[:-1])]
        self.stages = nn.ModuleList(
            nn.Sequential(start, *(Partial(w, 2) for _ in range(d)))
            for start, w, d in zip(first, widths, depths, strict=True)
        )
        self.joins = nn.ModuleList([Join(320, 160), Join(160, 80), Join(80, 40)])
        self.last = nn.Sequential(nn.Conv2d(40, 40, 3, padding=1, bias=False), nn.InstanceNorm2d(40))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The three maps, the finest first."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        for join, higher in zip(self.joins, maps[-2::-1], strict=True):
            x = join(x, higher)
            maps.append(x)
        return [self.last(maps[-1]), maps[-2], maps[-3]]


class Guide(nn.Module):
    """Weigh the cost volume by the left image's features: strips of 7, 11 and 21 pixels, depthwise."""

    def __init__(self, width: int, guide: int) -> None:
        """Make random weights."""
        super().__init__()
        self.first, self.last = nn.Conv2d(guide, width, 1), nn.Conv2d(width, width, 1)
        self.strips = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, (1, k), padding=(0, k // 2), groups=width),
                nn.Conv2d(width, width, (k, 1), padding=(k // 2, 0), groups=width),
            )
            for k in (7, 11, 21)
        )

    def forward(self, cost: Tensor, x: Tensor) -> Tensor:
        """Weighted costs."""
        share = x = self.first(x)
        for strip in self.strips:
            share = share + strip(x)
        return self.last(share) * cost


class Aggregation(nn.Module):
    """A U of FasterNet blocks over the cost volume: 4, 8 and 16 blocks at a quarter, an eighth and a sixteenth."""

    def __init__(self, width: int = 48) -> None:
        """Make random weights."""
        super().__init__()
        widths, counts = (width, 2 * width, 4 * width), (4, 8, 16)
        none = nn.Identity()
        self.down = nn.ModuleList([none, *(unit(w, 2 * w, stride=2, act=none) for w in widths[:-1])])
        self.steps = nn.ModuleList(
            nn.Sequential(*(Partial(w, 4) for _ in range(count))) for w, count in zip(widths, counts, strict=True)
        )
        self.guides = nn.ModuleList(Guide(w, g) for w, g in zip(widths, (40, 80, 160), strict=True))
        self.up = nn.ModuleList(nn.Sequential(*up(2 * w, w, 3)) for w in (2 * width, width))
        self.aside = nn.ModuleList(Partial(w, 4) for w in (2 * width, width))

    def forward(self, x: Tensor, features: list[Tensor]) -> Tensor:
        """Costs after aggregation, at the same size."""
        maps = []
        for first, steps, guide, feature in zip(self.down, self.steps, self.guides, features, strict=True):
            x = guide(steps(first(x)), feature)
            maps.append(x)
        for to, aside, higher in zip(self.up, self.aside, maps[-2::-1], strict=True):
            x = F.relu(to(x) + aside(higher))
        return x


class Stereo(nn.Module):
    """Disparity of two images: correlation of 48 shifts at a quarter of the size, aggregation, and the way up.

    The mean over channels of the product of two maps, one of them shifted, is written as the publisher exported it: a
    pad and a slice for each shift.
    """

    def __init__(self, shifts: int = 48) -> None:
        """Make random weights."""
        super().__init__()
        self.shifts, self.features, self.aggregate = shifts, Features(), Aggregation(shifts)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.register_buffer("levels", torch.arange(shifts, dtype=torch.float32).view(1, shifts, 1, 1))
        norms = [nn.Conv2d(40, 40, 3, 1, 1, bias=False), nn.InstanceNorm2d(40)]
        again = [nn.Conv2d(40, 40, 3, 1, 1, bias=False), nn.InstanceNorm2d(40)]
        self.refine = nn.Sequential(*norms, nn.LeakyReLU(), *again, nn.ReLU())
        self.stem = nn.Sequential(unit(3, 16, stride=2, act=nn.LeakyReLU()), unit(16, 16))
        self.join, self.full = Join(40, 16), nn.ConvTranspose2d(16, 9, 4, 2, 1, bias=False)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Disparity [B, 1, H, W] of images of 0 to 255, [B, 3, H, W]."""
        left, right = ((image / 255.0 - self.mean) / self.deviation for image in (left, right))
        ours, others = self.features(left), self.features(right)
        cost = self.aggregate(self.correlate(ours[0], others[0]), ours)
        disparity = (F.softmax(cost, dim=1) * self.levels).sum(1, keepdim=True) * 4.0
        share = F.softmax(self.full(self.join(self.refine(ours[0]), self.stem(left))), dim=1)
        return (self.nine(disparity) * share).sum(1, keepdim=True)

    def correlate(self, left: Tensor, right: Tensor) -> Tensor:
        """Cost volume [B, shifts, H, W]."""
        width = left.shape[-1]
        moved = [right, *(F.pad(right, (d, 0, 0, 0))[..., :width] for d in range(1, self.shifts))]
        return torch.cat([(left * other).mean(1, keepdim=True) for other in moved], 1)

    @staticmethod
    def nine(x: Tensor) -> Tensor:
        """The 3 x 3 neighbours of each pixel as channels, at four times the size."""
        height, width = x.shape[-2:]
        padded = F.pad(x, (1, 1, 1, 1))
        near = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return F.interpolate(torch.cat(near, 1), (4 * height, 4 * width), mode="nearest")
