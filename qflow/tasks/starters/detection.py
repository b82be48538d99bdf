"""My detector as a task of qflow. Lines with CHANGE are yours to change; conf/task/mine.yaml names the pictures."""

from pathlib import Path

import torch
from torch import Tensor, nn

from qflow.tasks.detection.adapters import Suppression
from qflow.tasks.detection.data import CocoData
from qflow.tasks.detection.example_training import train_example

CLASSES = 3  # CHANGE: number of categories in the annotations
STRIDE = 8  # pixels of the image for one cell of the outputs


class Detector(nn.Module):
    """CHANGE: your network. Decoding and suppression of boxes stay out of it; `Boxes` below does both in float."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 32, 4), block(32, 48, 2), block(48, 48, 1))
        self.coarse = nn.Sequential(block(48, 48, 2), block(48, 48, 2), block(48, 48, 1), nn.Upsample(scale_factor=4))
        self.scores, self.distances = nn.Conv2d(48, CLASSES, 1), nn.Conv2d(48, 4, 1)
        nn.init.constant_(self.scores.get_parameter("bias"), -3.0)  # most cells show nothing

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """From images [B, 3, H, W]: logits [B, CLASSES, h, w], and log distances [B, 4, h, w] to a box's sides."""
        x = self.body(image)
        x = x + self.coarse(x)
        return self.scores(x), self.distances(x)


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, max(3, stride), stride, padding=int(stride < 4), bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def build_model(weights: str = "my_weights.pt") -> nn.Module:
    """Return the float network with its weights."""
    model = Detector()
    if not Path(weights).exists():  # CHANGE: your weights exist, so leave these three lines out
        pictures = CocoData("example/instances.json", "example/images", size=96, calibration_size=300).calibration
        torch.save(train_example(model, pictures).state_dict(), weights)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


class Boxes(Suppression):
    """CHANGE: what your outputs mean; qflow.tasks.detection has adapters for Ultralytics and torchvision."""

    def __call__(self, outputs: tuple[Tensor, Tensor], size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """For images of `size` (height, width) the boxes of each that stay, from all boxes and scores for the classes.

        Boxes are left, top, right, bottom in pixels of the image, classes in the order of the category ids.
        """
        scores, distances = outputs
        y, x = torch.meshgrid(*(torch.arange(cells) + 0.5 for cells in distances.shape[-2:]), indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1).flatten(0, 1).to(distances)
        boxes = (centres + distances.flatten(2).mT.exp() * distances.new_tensor([-1, -1, 1, 1])) * STRIDE
        return self.kept(boxes, scores.sigmoid().flatten(2).mT)
