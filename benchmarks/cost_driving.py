"""DiffusionDrive with ResNet-34 (CVPR 2025) as its publisher deployed it: camera, LiDAR, status and noise to a path.

What depends on the time step alone is a constant of the deployed network, and its adaptive pools are depthwise
convolutions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cost_networks import Block, unit
from benchmarks.cost_ocr import Attention

WIDTHS = (64, 128, 256, 512)
MODES, POSES, WIDTH = 20, 8, 256


class Branch(nn.Module):
    """The stem and the four stages of ResNet-34."""

    def __init__(self, cin: int) -> None:
        """Make random weights."""
        super().__init__()
        self.stem = nn.Sequential(unit(cin, 64, 7, 2), nn.MaxPool2d(3, 2, 1))
        sizes = zip((64, *WIDTHS), WIDTHS, (3, 4, 6, 3), strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(Block(a, b, 1 if a == b else 2), *(Block(b, b) for _ in range(n - 1))) for a, b, n in sizes
        )


class Fuse(nn.Module):
    """TransFuser's fusion of a stage: 8 x 32 tokens of the camera and 8 x 8 of the LiDAR in two transformer layers."""

    def __init__(self, width: int, cell: int) -> None:
        """Make random weights; a token stands for `cell` x `cell` pixels."""
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Conv2d(width, width, cell, cell, groups=width, bias=False) if cell > 1 else nn.Identity()
            for _ in range(2)
        )
        self.into, self.back = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.places = nn.Parameter(torch.randn(1, 320, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.attentions = nn.ModuleList(Attention(width, 4) for _ in range(2))
        self.feeds = nn.ModuleList(feed(width, 4 * width) for _ in range(2))

    def forward(self, image: Tensor, lidar: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps with what the other one adds."""
        seen, felt = self.pools[0](image), self.into(self.pools[1](lidar))
        x = torch.cat([seen.flatten(2).transpose(1, 2), felt.flatten(2).transpose(1, 2)], 1) + self.places
        for i, (attention, linear) in enumerate(zip(self.attentions, self.feeds, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + linear(self.norms[2 * i + 1](x))
        x = self.norms[4](x).transpose(1, 2)
        seen, felt = x[..., :256].unflatten(2, (8, 32)), self.back(x[..., 256:].unflatten(2, (8, 8)))
        return image + resized(seen, image), lidar + resized(felt, lidar)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the size of `like`."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def feed(width: int, inner: int, out: int | None = None) -> nn.Sequential:
    """Two linear layers with a ReLU between."""
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, out or width))


def linear_norm(cin: int, cout: int = WIDTH) -> nn.Sequential:
    """Linear layer, ReLU, layer norm."""
    return nn.Sequential(nn.Linear(cin, cout), nn.ReLU(), nn.LayerNorm(cout))


class Reader(nn.Module):
    """Decoder layer of the queries: self-attention, attention to the BEV tokens, two linear layers, norms after."""

    def __init__(self) -> None:
        """Make random weights."""
        super().__init__()
        self.own, self.other, self.feed = Attention(WIDTH, 8), Attention(WIDTH, 8), feed(WIDTH, 4 * WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[B, N, C] to the same."""
        x = self.norms[0](x + self.own(x))
        x = self.norms[1](x + self.other(x, tokens))
        return self.norms[2](x + self.feed(x))


class Denoiser(nn.Module):
    """A layer of the diffusion decoder: samples the BEV at the path's points, attends, and moves the points."""

    def __init__(self, steps: int) -> None:
        """Make random weights; the modulation by time is a constant for each of the `steps`."""
        super().__init__()
        self.value, self.weigh = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.ReLU()), nn.Linear(WIDTH, POSES)
        self.out, self.feed = nn.Linear(WIDTH, WIDTH), feed(WIDTH, 4 * WIDTH)
        self.agents, self.ego = Attention(WIDTH, 8), Attention(WIDTH, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(2, 1, 1, WIDTH)) for _ in range(steps))
        self.score = nn.Sequential(linear_norm(WIDTH), linear_norm(WIDTH), nn.Linear(WIDTH, 1))
        self.move = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), feed(WIDTH, WIDTH, 3 * POSES))

    def forward(
        self, x: Tensor, points: Tensor, bev: Tensor, agents: Tensor, ego: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Points and headings of the paths, and their scores."""
        grid = torch.cat([points[..., 1:2], points[..., 0:1]], -1) / 32.0
        sampled = F.grid_sample(self.value(bev), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        weights = F.softmax(self.weigh(x), dim=-1).unsqueeze(1)
        x = x + self.out((weights * sampled).sum(-1).transpose(1, 2))
        x = self.norms[0](x + self.agents(x, agents))
        x = self.norms[1](x + self.ego(x, ego))
        x = self.norms[2](self.feed(x))
        x = x * self.scales[step][0] + self.scales[step][1]
        moved = self.move(x).unflatten(2, (POSES, 3))
        return torch.cat([moved[..., :2] + points, torch.tanh(moved[..., 2:]) * math.pi], -1), self.score(x)


class Driving(nn.Module):
    """The whole network; two denoising steps of two layers each."""

    def __init__(self, steps: int = 2) -> None:
        """Make random weights."""
        super().__init__()
        self.camera, self.lidar = Branch(3), Branch(1)
        self.fuse = nn.ModuleList(Fuse(w, c) for w, c in zip(WIDTHS, (8, 4, 2, 1), strict=True))
        self.c5, self.p5, self.p4 = nn.Conv2d(512, 64, 1), nn.Conv2d(64, 64, 3, 1, 1), nn.Conv2d(64, 64, 3, 1, 1)
        self.small, self.status = nn.Conv2d(512, WIDTH, 1), nn.Linear(8, WIDTH)
        self.places, self.queries = nn.Parameter(torch.randn(1, 65, WIDTH)), nn.Parameter(torch.randn(1, 31, WIDTH))
        self.readers, self.wide = nn.ModuleList(Reader() for _ in range(3)), linear_norm(WIDTH + 64)
        self.semantic = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 7, 1))
        self.agent, self.label = feed(WIDTH, 4 * WIDTH, 5), nn.Linear(WIDTH, 1)
        self.anchors = nn.Parameter(torch.randn(1, MODES, POSES, 2))
        self.encode = nn.Sequential(linear_norm(512), nn.Linear(WIDTH, WIDTH))
        self.layers, self.steps = nn.ModuleList(Denoiser(steps) for _ in range(2)), steps
        self.register_buffer("rates", 2 * math.pi / 10000 ** (torch.arange(16) / 16))

    def forward(self, image: Tensor, lidar: Tensor, status: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """The path [B, 8, 3], agents and their labels, and the semantic map."""
        image, lidar = self.camera.stem(image), self.lidar.stem(lidar)
        for left, right, fuse in zip(self.camera.stages, self.lidar.stages, self.fuse, strict=True):
            image, lidar = fuse(left(image), right(lidar))
        fine = F.relu(self.p5(F.interpolate(F.relu(self.c5(lidar)), scale_factor=2.0, mode="bilinear")))
        fine = F.relu(self.p4(F.interpolate(fine, (64, 64), mode="bilinear")))
        tokens = torch.cat([self.small(lidar).flatten(2).transpose(1, 2), self.status(status).unsqueeze(1)], 1)
        tokens = tokens + self.places
        coarse = F.interpolate(tokens[:, :-1].transpose(1, 2).unflatten(2, (8, 8)), (64, 64), mode="bilinear")
        bev = self.wide(torch.cat([coarse, fine], 1).flatten(2).transpose(1, 2))
        bev = bev.transpose(1, 2).unflatten(2, (64, 64))
        found = self.queries
        for reader in self.readers:
            found = reader(found, tokens)
        ego, agents = found[:, :1], found[:, 1:]
        boxes = self.agent(agents)
        boxes = torch.cat(
            [torch.tanh(boxes[..., :2]) * 32.0, torch.tanh(boxes[..., 2:3]) * math.pi, boxes[..., 3:]], -1
        )
        semantic = F.interpolate(self.semantic(fine), (128, 256), mode="bilinear")
        return self.path(noise, bev, agents, ego), boxes, self.label(agents), semantic

    def path(self, noise: Tensor, bev: Tensor, agents: Tensor, ego: Tensor) -> Tensor:
        """The best of the 20 paths after denoising."""
        paths, scores, noisy = None, None, self.anchors + noise * 0.1
        for step in range(self.steps):
            points = torch.clamp(noisy, -1.0, 1.0) * 28.0
            x = self.encode(self.waves(points).flatten(2))
            for layer in self.layers:
                paths, scores = layer(x, points, bev, agents, ego, step)
                points = paths[..., :2]
            noisy = points / 28.0 * 0.9 + noisy * 0.1
        best = torch.argmax(scores, 1, keepdim=True).unsqueeze(-1).expand(-1, 1, POSES, 3)
        return torch.gather(paths, 1, best).squeeze(1)

    def waves(self, points: Tensor) -> Tensor:
        """Sines and cosines of the points, 64 for each."""
        turned = points.unsqueeze(-1) * self.rates
        return torch.cat([torch.sin(turned), torch.cos(turned)], -1).flatten(3)
