"""Networks with planted int8 damage for the search benchmarks: trained on noisy digits, then rescaled per channel.

If a channel is multiplied by f where it leaves a batch norm and divided by f where it enters the next convolution, the
float function stays the same. At int8 one scale serves all channels, so the other channels of that tensor are rounded
f times more coarsely. The divided weights lose as much precision in the int8 weights of that convolution, which an
int16 output does not repair; therefore only one channel of a tensor is rescaled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.networks import ResNet
from qflow.core.device_rules import DeviceRules
from qflow.tasks.digits import Accuracy
from qflow.tasks.task import Task, make_task

NASH_M = DeviceRules(
    march="nash-m",
    oe_version="3.0.17",
    int8_inputs={"resize": [0], "max_pool": [0], "avg_pool": [0], "grid_sample": [0]},
    int8_outputs=["resize", "max_pool", "grid_sample"],
    float16_kinds=["layer_norm", "lut", "softmax", "add"],
)
CALIBRATION, EVALUATION = 256, 512


def pictures(side: int = 8, channels: int = 1, noise: float = 0.3) -> TensorDataset:
    """scikit-learn's digits in a fixed order, upscaled to `side`, with fixed noise."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.target), generator=generator)
    images = torch.from_numpy(digits.images).float()[order, None] / 16
    images = F.interpolate(images, size=(side, side), mode="bilinear").repeat(1, channels, 1, 1)
    images = images + noise * torch.randn(images.shape, generator=generator)
    return TensorDataset(images, torch.from_numpy(digits.target).long()[order])


def train(network: Callable[[], nn.Module], data: TensorDataset, *, epochs: int, rate: float, seed: int) -> nn.Module:
    """Train with Adam and one learning-rate cycle on all samples but those for evaluation; returned in eval mode."""
    images, labels = (tensor[EVALUATION:] for tensor in data.tensors)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        model = network()
        if not epochs:
            return model.eval()
        optimizer = torch.optim.Adam(model.parameters())
        steps = epochs * math.ceil(len(images) / 64)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[index]), labels[index]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def task(
    name: str, model: nn.Module, data: TensorDataset, deploy_shape: tuple[int, ...], evaluation: int = EVALUATION
) -> Task:
    """A task that calibrates on the first training samples and evaluates on samples that training never sees."""

    def part(start: int, count: int) -> TensorDataset:
        return TensorDataset(*(tensor[start : start + count] for tensor in data.tensors))

    splits = SimpleNamespace(calibration=part(EVALUATION, CALIBRATION), evaluation=part(0, evaluation))
    return make_task(name=name, model=model, data=splits, metric=Accuracy(), deploy_shape=deploy_shape)


def rescale(norms: Sequence[nn.BatchNorm2d], readers: Sequence[nn.Conv2d], channel: int, factor: float) -> None:
    """Multiply one channel by `factor` where it leaves the batch norms, divide it where the convolutions read it."""
    with torch.no_grad():
        for norm in norms:
            norm.weight[channel] *= factor
            norm.bias[channel] *= factor
        for reader in readers:
            reader.weight[:, channel] /= factor


BLOCKS = (1, 4, 7)


def planted_resnet(model: ResNet, images: Tensor, seed: int, factor: float = 200.0) -> tuple[ResNet, list[str]]:
    """ResNet-20 with one channel of bn1/conv2 in three blocks rescaled, and the operators that this damages at int8.

    int8 weights lose the rescaled channel, so it has to be one that the network does not need: the first channel, in an
    order drawn by `seed`, whose range is at least half of the largest and without which the float network changes its
    answer on at most two of `images`.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for number in BLOCKS:
        block = model.blocks[number]
        channel = _spare(model, block, images, generator)
        rescale([block.bn1], [block.conv2], channel, factor)
    return model, [f"blocks.{number}.conv1" for number in BLOCKS]


def _spare(model: nn.Module, block: nn.Module, images: Tensor, generator: torch.Generator) -> int:
    seen: list[Tensor] = []
    hook = block.conv2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].amax((0, 2, 3))))
    with torch.no_grad():
        answers = model(images).argmax(1)
        hook.remove()
        order = torch.randperm(len(seen[0]), generator=generator).tolist()
        large = [c for c in order if float(seen[0][c]) >= 0.5 * float(seen[0].max())]
        for channel in large:
            weight = block.conv2.weight[:, channel].clone()
            block.conv2.weight[:, channel] = 0.0
            changed = int((model(images).argmax(1) != answers).sum())
            block.conv2.weight[:, channel] = weight
            if changed <= 2:
                return channel
    return large[0]


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class TwelveNet(nn.Module):
    """A small residual network with 12 operators that can be int16 on nash-m."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        double = 2 * width
        self.stem = nn.Sequential(Unit(1, width), Unit(width, width, 2))
        self.left = nn.Sequential(Unit(width, width), Unit(width, width))
        self.down = Unit(width, double, 2)
        self.right = nn.Sequential(Unit(double, double), Unit(double, double))
        self.tail = nn.Sequential(Unit(double, double), Unit(double, double))
        self.dense = nn.Linear(double, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.left(x)
        x = self.down(x)
        x = self.tail(x + self.right(x))
        return self.dense(F.adaptive_avg_pool2d(x, 1).flatten(1))


def planted_twelve(model: TwelveNet, seed: int) -> TwelveNet:
    """Damage everywhere: one channel of both residual streams is rescaled by 24 to 64, one of every tensor between two
    convolutions by 64 to 256.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    groups: list[tuple[list[Unit], list[nn.Conv2d], float, float]] = [
        ([model.stem[0]], [model.stem[1].conv], 64, 256),
        ([model.left[0]], [model.left[1].conv], 64, 256),
        ([model.right[0]], [model.right[1].conv], 64, 256),
        ([model.tail[0]], [model.tail[1].conv], 64, 256),
        ([model.stem[1], model.left[1]], [model.left[0].conv, model.down.conv], 24, 64),
        ([model.down, model.right[1]], [model.right[0].conv, model.tail[0].conv], 24, 64),
    ]
    for makers, readers, low, high in groups:
        channel = int(torch.randint(makers[0].norm.num_features, (), generator=generator))
        factor = low * (high / low) ** float(torch.rand((), generator=generator))
        rescale([unit.norm for unit in makers], readers, channel, factor)
    return model
