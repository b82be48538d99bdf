"""A small detector built as detectors are: all its convolution blocks hold one nn.SiLU object."""

import copy

import torch
from torch import nn


class Conv(nn.Module):
    """Convolution, batch norm and the activation that all blocks share."""

    shared = nn.SiLU()

    def __init__(self, inner, outer, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        self.act = self.shared

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions and a residual."""

    def __init__(self, width):
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width, 3), Conv(width, width, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class Csp(nn.Module):
    """Half of the channels pass a bottleneck; everything is concatenated."""

    def __init__(self, inner, outer):
        super().__init__()
        self.cv1, self.cv2 = Conv(inner, outer), Conv(outer + outer // 2, outer)
        self.m = Bottleneck(outer // 2)

    def forward(self, x):
        a, b = self.cv1(x).chunk(2, 1)
        return self.cv2(torch.cat([a, b, self.m(b)], 1))


class Sppf(nn.Module):
    """One max pool called three times."""

    def __init__(self, width):
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(width * 2, width)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        x = [self.cv1(x)]
        for _ in range(3):
            x.append(self.m(x[-1]))
        return self.cv2(torch.cat(x, 1))


class Detector(nn.Module):
    """CSP stages, SPPF, an upsampled path and a head for each of two scales."""

    def __init__(self, channels=3, outputs=6):
        super().__init__()
        self.stem, self.stage1 = Conv(channels, 8, 3, 2), Csp(8, 16)
        self.down, self.stage2, self.sppf = Conv(16, 16, 3, 2), Csp(16, 16), Sppf(16)
        self.up, self.neck = nn.Upsample(scale_factor=2), Csp(32, 16)
        self.heads = nn.ModuleList(nn.Sequential(Conv(16, 16, 3), nn.Conv2d(16, outputs, 1)) for _ in range(2))

    def forward(self, image):
        fine = self.stage1(self.stem(image))
        coarse = self.sppf(self.stage2(self.down(fine)))
        fine = self.neck(torch.cat([self.up(coarse), fine], 1))
        return {"fine": self.heads[0](fine), "coarse": self.heads[1](coarse)}


def own_activations(model):
    """A copy of the model with an activation object in each block, as the model check asks for."""
    mended = copy.deepcopy(model)
    for module in mended.modules():
        if isinstance(module, Conv):
            module.act = copy.deepcopy(module.act)
    return mended


class Classifier(nn.Module):
    """The detector on one-channel images; the score of a class is its mean over the places of both scales."""

    def __init__(self):
        super().__init__()
        self.detector = Detector(channels=1, outputs=10)

    def forward(self, image):
        found = self.detector(image)
        return {"scores": found["fine"].mean((2, 3)) + found["coarse"].mean((2, 3))}
