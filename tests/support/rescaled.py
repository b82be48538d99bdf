"""A residual network whose channels carry strong factors: in float it is the network that it was made from."""

import torch
import torch.nn.functional as F
from support.models import revive
from torch import nn


class Block(nn.Module):
    """The residual block of the CIFAR networks: the first convolution strides, a 1x1 convolution takes its place."""

    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet20(nn.Module):
    """Three stages of three blocks, as in the residual networks for CIFAR, a quarter as wide."""

    def __init__(self, colors=1):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(colors, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        sizes = [(8, 8, 1)] * 3 + [(8, 16, 2), (16, 16, 1), (16, 16, 1)] + [(16, 32, 2), (32, 32, 1), (32, 32, 1)]
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


def resnet20(seed=0):
    """The network in eval mode, alive in every layer, with variance kept along its depth."""
    torch.manual_seed(seed)
    model = revive(ResNet20(), seed)
    with torch.no_grad():
        for block in model.blocks:
            block.bn2.weight.mul_(0.3)
    return model


def rescaled(model, blocks=(1, 4, 7), decades=1.5, seed=0):
    """Channel c between the convolutions of these blocks times 10 ** u, u even over +-`decades`; float is unchanged.

    The activation has channels of very different range then, and so have the columns of the weight that reads it:
    one scale an operator (and one a row) leaves most of them a few codes, in both.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in (model.blocks[i] for i in blocks):
            count = len(block.bn1.weight)
            factors = 10 ** (torch.linspace(-decades, decades, count)[torch.randperm(count, generator=generator)])
            block.bn1.weight.mul_(factors)
            block.bn1.bias.mul_(factors)
            block.conv2.weight.div_(factors.view(1, -1, 1, 1))
    return model
