"""torchvision's detectors: the network alone, and an adapter that finds the boxes which the whole detector finds."""

import pytest
import torch
from support.torchvision_ops import declare
from torch import nn

from qflow.core.errors import ConfigError
from qflow.tasks.detection.boxes import overlaps
from qflow.tasks.detection.torchvision import Boxes, Network

declare()
pytest.importorskip("torchvision", reason="torchvision is not installed")
SIZE = (64, 96)
PLAIN = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


class Pyramid(nn.Module):
    """Two levels of 32 channels."""

    out_channels = 32

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 32, 8, 8), nn.Conv2d(32, 32, 3, 2, 1)

    def forward(self, image):
        fine = self.stem(image)
        return {"0": fine, "1": self.down(fine)}


def detector_of(name):
    from torchvision.models import detection
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

    torch.manual_seed(0)
    if name == "SSD":
        backbone = Pyramid()
        backbone.out_channels = [32, 32]
        boxes = DefaultBoxGenerator([[2], [2]], scales=[0.2, 0.4, 0.6])
        return detection.ssd.SSD(backbone, boxes, SIZE[::-1], 3, score_thresh=0.2, **PLAIN).eval()
    ratios = (1.0,) if name == "FCOS" else (0.5, 1.0, 2.0)
    anchors = AnchorGenerator(((16,), (32,)), (ratios, ratios))
    made = getattr(detection, name)(
        Pyramid(), 3, min_size=SIZE[0], max_size=SIZE[1], anchor_generator=anchors, score_thresh=0.001, **PLAIN
    )
    return made.eval()


def suppressed(boxes, scores, labels, most):
    """What torchvision's compiled operator computes, which a build for another torch lacks."""
    order = scores.argsort(descending=True, stable=True)
    doubles, kept = ((overlaps(boxes) > most) & (labels[:, None] == labels)).numpy(), []
    for index in order.tolist():
        if not doubles[kept, index].any():
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)


@pytest.mark.parametrize("name", ["FCOS", "RetinaNet", "SSD"])
def test_the_adapter_finds_what_the_detector_finds(name, monkeypatch):
    monkeypatch.setattr("torchvision.ops.boxes.batched_nms", suppressed)
    detector = detector_of(name)
    with torch.no_grad():
        for weight in detector.head.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
        images = torch.rand(2, 3, *SIZE)
        whole = detector(list(images))
        before = {key: value.clone() for key, value in detector.state_dict().items()}
        found = Boxes(detector)(Network(detector)(images), SIZE)
    assert sum(len(one["boxes"]) for one in whole) > 20
    for one, other in zip(whole, found, strict=True):
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_another_model_is_refused():
    with pytest.raises(ConfigError, match="is an FCOS, RetinaNet or SSD of torchvision, but got Linear. Take another"):
        Network(nn.Linear(2, 2))
