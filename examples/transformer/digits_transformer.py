"""A small vision transformer that reads digits, with the outlier channels that trained transformers have.

Images are scikit-learn's digits, 8x8, gray. After the training three channels of each layer norm are 128 times as
large, and the weights that read them 128 times as small, so that the float function stays as it is. Large transformers
grow such channels by themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

WIDTH, HEADS, DEPTH = 48, 4, 3


class Layer(nn.Module):
    """Layer norm and attention, layer norm and two linear layers, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(-1)
        x = x + self.out((scores @ v).transpose(1, 2).reshape(batch, tokens, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class DigitsTransformer(nn.Module):
    """Patches of 2x2, positions, layers, and the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, image: Tensor) -> Tensor:
        """Scores [B, 10] of images float32 [B, 1, 8, 8]."""
        x = self.patches(image).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(x)).mean(1))


class Data:
    """Every third digit is evaluated; calibration takes digits that the network was trained on."""

    def __init__(self, calibration: int = 256) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target)
        held = torch.arange(len(labels)) % 3 == 0
        self.train = TensorDataset(images[~held], labels[~held])
        self.calibration = TensorDataset(images[~held][:calibration], labels[~held][:calibration])
        self.evaluation = TensorDataset(images[held], labels[held])


def build_model(epochs: int = 30, factor: float = 128.0) -> nn.Module:
    """Train the network in about 15 seconds, and rescale three channels of each layer norm by `factor`."""
    torch.manual_seed(0)
    model = DigitsTransformer()
    images, labels = Data().train.tensors
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * 10)
    for _ in range(epochs):
        for index in torch.randperm(len(labels))[:1190].view(10, -1):
            optimizer.zero_grad()
            F.cross_entropy(model(images[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        for layer in model.layers:
            for norm, reader in ((layer.norm1, layer.qkv), (layer.norm2, layer.up)):
                chosen = torch.randperm(WIDTH)[:3]
                norm.weight[chosen] *= factor
                norm.bias[chosen] *= factor
                reader.weight[:, chosen] /= factor
    return model.eval()


class Accuracy:
    """Share of digits that are read rightly."""

    direction, bounds = "maximize", (0.0, 1.0)

    def __call__(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One score for each sample, float32 [B]."""
        return (outputs.argmax(1) == batch[1]).float()
