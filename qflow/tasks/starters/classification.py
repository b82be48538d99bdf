"""My classifier as a task of qflow. Lines with CHANGE are yours to change."""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """CHANGE: your network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        )
        self.classes = nn.Linear(32 * 4 * 4, 10)

    def forward(self, image: Tensor) -> Tensor:
        """From images [B, 1, 8, 8] a score for each of 10 classes."""
        scores: Tensor = self.classes(self.features(image).flatten(1))
        return scores


class Data:
    """CHANGE: your samples (image, class), preprocessed as at inference; any dataset with len() and [i] will do."""

    def __init__(self) -> None:
        images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
        images = images.float().reshape(-1, 1, 8, 8) / 16
        self.train = TensorDataset(images[600:], labels[600:])  # needed for training (qat) alone
        self.calibration = TensorDataset(images[600:856], labels[600:856])  # a few hundred that represent all
        self.evaluation = TensorDataset(images[:600], labels[:600])


class Top1:
    """Share of images whose class has the highest score."""

    name, direction, bounds = "top1", "maximize", (0.0, 1.0)

    def __call__(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return one score for each image of a batch."""
        return (outputs.argmax(1) == batch[1]).float()


def build_model(weights: str = "my_weights.pt") -> nn.Module:
    """Return the float network with its weights."""
    model = Net()
    if not Path(weights).exists():  # CHANGE: your weights exist, so leave these two lines and `trained` out
        torch.save(trained(model).state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def trained(model: Net) -> Net:
    """Train for about a second."""
    torch.manual_seed(0)
    images, labels = Data().train.tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(8):
        for some in torch.randperm(len(labels)).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(images[some]), labels[some]).backward()
            optimizer.step()
    return model
