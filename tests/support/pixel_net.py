"""A user's small model for classes of pixels, whose int8 loses because one channel drowns another."""

import torch
from torch import nn


class PixelNet(nn.Module):
    """Images [B, 3, H, W] -> scores of 3 classes at half the size."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, image):
        return {"scores": self.head(torch.relu(self.stem(image)))}


def build():
    torch.manual_seed(0)
    model = PixelNet()
    with torch.no_grad():
        model.stem.weight[0] *= 60
        model.head.weight[:, 0] /= 60
    return model.eval()
