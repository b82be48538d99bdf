"""Where quantization begins and ends."""

from torch import nn
from torch.ao.quantization import DeQuantStub  # noqa: F401


class QuantStub(nn.Module):
    def __init__(self, scale=None):
        super().__init__()
        self.fixed = scale

    def forward(self, x):
        return x
