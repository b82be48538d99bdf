"""Digits with channels of unequal size: no mix of int8, int16 and fp16 reaches the float accuracy without a repair.

The network computes the same function as the digits network, but every fourth channel of its first two convolutions is
256 times as large, and the layers that read it have weights 256 times as small for it. int8 activations lose the other
channels, int8 weights lose these. Activations and weights would have to be int16 at once ("dual int16"), which Journey
6M does not support. Equalization takes the factor back (docs/repair.md). QAT trains the weights that int8 rounded away,
at a learning rate that fits such small weights.
"""

from __future__ import annotations

import torch
from torch import nn

from qflow.tasks import digits
from qflow.tasks.digits import DigitsNet

GAIN = 256.0  # a power of two: the function stays the same bit for bit
EVERY = 4  # one channel in so many has the gain


def build_model(*, epochs: int = 30, seed: int = 0) -> nn.Module:
    """Train the float network in about three seconds and rescale its channels. No global random state changes."""
    model = digits.fit(DigitsNet, digits.build_data().train, epochs=epochs, seed=seed)
    assert isinstance(model, DigitsNet)
    spread(model)
    return model


@torch.no_grad()
def spread(model: DigitsNet, gain: float = GAIN, every: int = EVERY) -> None:
    """Multiply one in `every` channels of the sum of conv1 and conv2 by `gain`, divide the weights that read it."""
    for norm in (model.norm1, model.norm2):  # both branches of the sum
        norm.weight[::every] *= gain
        norm.bias[::every] *= gain
    for reader in (model.conv2, model.conv3):
        reader.weight[:, ::every] /= gain
