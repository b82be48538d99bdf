"""Classification, segmentation, detection and optical flow of torchvision.

A detector is cut before its post-processing, as it is deployed: boxes and scores for every anchor come out. Its list of
images, resizing and NMS run on the host.
"""

import torch
from torch import nn
from zoo_real.registry import Entry, images


class Raw(nn.Module):
    """The network of a torchvision detector without its transforms and its post-processing."""

    def __init__(self, detector):
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, image):
        features = self.backbone(image)
        return self.head(list(features.values()))


def resnet50():
    from torchvision.models import resnet50

    return resnet50(num_classes=8, width_per_group=16), images(64, 64)


def deeplabv3():
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    model = deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return model, images(64, 64)


def ssdlite():
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    detector = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)
    return Raw(detector), images(96, 96)


def fcos():
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    class Pyramid(nn.Module):
        """Two levels of 32 channels."""

        out_channels = 32

        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 4, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
            self.down = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))

        def forward(self, image):
            fine = self.stem(image)
            return {"0": fine, "1": self.down(fine)}

    anchors = AnchorGenerator(sizes=((8,), (16,)), aspect_ratios=((1.0,), (1.0,)))
    return Raw(FCOS(Pyramid(), num_classes=4, anchor_generator=anchors)), images(32, 32)


def raft_small():
    from torchvision.models.optical_flow import raft_small

    class Flow(nn.Module):
        """Two refinements only: each calls the same modules again."""

        def __init__(self):
            super().__init__()
            self.raft = raft_small(weights=None)

        def forward(self, first, second):
            return self.raft(first, second, num_flow_updates=2)[-1]

    return Flow(), lambda batch: {"first": torch.rand(batch, 3, 128, 128), "second": torch.rand(batch, 3, 128, 128)}


def entry(build, sample=True, **settings):
    return Entry(f"torchvision_{build.__name__}", build, ("torchvision",), sample, **settings)


ENTRIES = (
    entry(resnet50, sample=False),
    entry(deeplabv3, sample=False),
    entry(ssdlite, sample=False),
    entry(raft_small, sample=False, double=False),
    entry(fcos, sample=False),
)
