"""Small tasks for the decision tree: each has one property by which a study decides."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Peak(nn.Module):
    """The height of the highest point of a map: a calibration that clips outliers loses it, at every dtype."""

    def __init__(self):
        super().__init__()
        self.gain, self.pool, self.top = nn.Conv2d(1, 2, 1), nn.MaxPool2d(4), nn.AdaptiveMaxPool2d(1)
        self.gain.weight.data.fill_(1.0)
        self.gain.bias.data.zero_()

    def forward(self, x):
        return self.top(self.pool(self.gain(x))).flatten(1)[:, 0]


def peak():
    return Peak().eval()


def _maps(seed):
    generator = torch.Generator().manual_seed(seed)
    heights = 20 + 20 * torch.rand(64, generator=generator)
    maps = torch.randn(64, 1, 32, 32, generator=generator)
    maps[:, 0, 7, 9] = heights
    return TensorDataset(maps, heights)


class Peaks:
    calibration, evaluation = _maps(0), _maps(1)


class Near:
    """The share of heights that are right within 1.5."""

    direction = "maximize"

    def __call__(self, outputs, batch):
        return ((outputs - batch[1]).abs() < 1.5).float()


class Divides(nn.Module):
    """A quotient whose divisor int8 rounds to zero, as in linear attention; zero by zero is NaN."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.value, self.size = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        x = self.body(x).relu()
        return self.value(x).relu() / torch.exp(-(20.0 * self.size(x)).abs().clamp(max=7.0))


def divides():
    return Divides().eval()


def _points(seed, model=None):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorDataset(x, divides()(x))


class Points:
    calibration, evaluation = _points(0), _points(1)


class Off:
    """The relative error of a sample."""

    direction = "minimize"

    def __call__(self, outputs, batch):
        return (outputs - batch[1]).norm(dim=1) / batch[1].norm(dim=1).clamp(min=1.0)


class Distracted(nn.Module):
    """Two outputs. The metric reads the second; the first loses most at int8, so that its operators rank first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud = nn.Linear(6, 8)

    def forward(self, x):
        return 100.0 * torch.sin(30.0 * self.loud(x)), torch.sin(10.0 * x[:, :3])


def distracted():
    return Distracted().eval()


def _angles(seed):
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorDataset(x, distracted()(x)[1])


class Angles:
    calibration, evaluation = _angles(0), _angles(1)


class SecondOff:
    """The mean error of the second output."""

    direction = "minimize"

    def __call__(self, outputs, batch):
        return (outputs[1] - batch[1]).abs().mean(1)
