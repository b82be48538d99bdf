"""R-Net of MTCNN (Zhang et al. 2016) with its published weights, on 200 crops with and without a face.

Weights and crops are read out of two wheels that the user downloads:

    pip download --no-deps facenet-pytorch==2.6.0 scikit-image==0.26.0
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = ("facenet_pytorch-*.whl", "facenet_pytorch/data/rnet.pt")
FACES = ("scikit_image-*.whl", "skimage/data/lfw_subset.npy")


class RNet(nn.Module):
    """Probability of a face [B] and the corrections [B, 4] of a box, in sides, for crops [B, 3, 24, 24] in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x))
        x = self.prelu4(self.dense4(x.permute(0, 3, 2, 1).reshape(x.shape[0], -1)))
        return self.dense5_1(x), self.dense5_2(x)


def missing(folder: Path | None) -> str:
    """Why R-Net cannot be built from the wheels in `folder`; empty if it can."""
    if folder is None:
        return "give the folder of its two wheels (--wheels)"
    absent = [pattern for pattern, _ in (WEIGHTS, FACES) if not list(folder.glob(pattern))]
    return f"no {absent[0]} in {folder}" if absent else ""


def _stored(folder: Path, place: tuple[str, str]) -> io.BytesIO:
    pattern, name = place
    with zipfile.ZipFile(sorted(folder.glob(pattern))[-1]) as wheel:
        return io.BytesIO(wheel.read(name))


def rnet(folder: Path) -> nn.Module:
    """R-Net with its published weights, in eval mode."""
    model = RNet()
    model.load_state_dict(torch.load(_stored(folder, WEIGHTS), weights_only=True))
    return model.eval()


def crops(folder: Path) -> tuple[Tensor, Tensor]:
    """Crops float32 [800, 3, 24, 24] in -1..1 and which are faces: 100 of faces and 100 of none, four crops of each."""
    gray = torch.from_numpy(np.load(_stored(folder, FACES))).float()[:, None]
    gray = F.interpolate(gray, size=(27, 27), mode="bilinear") * 2 - 1
    shifted = [gray[..., y : y + 24, x : x + 24] for y in (0, 3) for x in (0, 3)]
    images = torch.cat(shifted).repeat(1, 3, 1, 1)
    return images, (torch.arange(200) < 100).repeat(4)


class Boxes:
    """For a face the intersection over union of its box with that of the float model, 0 if it is not found; for other
    crops 1 if no face is found. A box is the unit square before its correction.
    """

    name = "boxes"
    direction = "maximize"

    def __call__(self, outputs: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """One score for each crop, float32 [B]; batch: crops, the float model's corrections [B, 4], which are faces."""
        corners, face = torch.tensor([0.0, 0.0, 1.0, 1.0]), batch[2]
        boxes, others = outputs[1] + corners, batch[1] + corners
        sides = torch.minimum(boxes[:, 2:], others[:, 2:]) - torch.maximum(boxes[:, :2], others[:, :2])
        inner = sides.clamp(min=0).prod(1)
        areas = [(box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (boxes, others)]
        overlap = inner / (areas[0] + areas[1] - inner)
        right = (outputs[0][:, 1] > outputs[0][:, 0]) == face
        return torch.where(face, overlap, torch.ones_like(overlap)) * right
