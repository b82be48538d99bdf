"""Detectors of torchvision (FCOS, RetinaNet, SSD): the network that is quantized, and the rest as the adapter.

A task has `task.model._target_=qflow.tasks.detection.torchvision.Network` with the detector in `task.model.detector`,
`task.metric.adapter._target_=qflow.tasks.detection.torchvision.Boxes` and
`task.metric.adapter.detector=${task.model.detector}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qflow.core.errors import ConfigError

PARTS = ("transform", "backbone", "head", "anchor_generator")


class Network(nn.Module):
    """Backbone and head of a detector, which run on the device, on normalized images [B, 3, H, W]."""

    def __init__(self, detector: nn.Module) -> None:
        """Take the two parts of `detector`. Raises ConfigError for another kind of model."""
        super().__init__()
        _require_detector(detector)
        self.backbone: Any = detector.backbone
        self.head: Any = detector.head

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """The outputs of the head for N anchors: `cls_logits` [B, N, C], `bbox_regression` [B, N, 4], and others."""
        found: dict[str, Tensor] = self.head(list(self.backbone(image).values()))
        return found


class Boxes:
    """Adapter: the detector's own anchors, thresholds, decoding and suppression, with the outputs of `Network`."""

    def __init__(self, detector: nn.Module) -> None:
        """Take the detector, whose weights do not matter here. Raises ConfigError for another kind of model."""
        _require_detector(detector)
        self.detector = detector.eval()

    def __call__(self, outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Sequence[Mapping[str, Tensor]]:
        """`boxes`, `scores` and `labels` of each picture. Labels are those that the detector was trained with."""
        from torchvision.models.detection.transform import GeneralizedRCNNTransform

        some = next(iter(outputs.values()))
        rest = type(self.detector).__new__(type(self.detector))
        rest.__dict__ = {**self.detector.__dict__, "_modules": dict(self.detector._modules)}
        rest.transform = GeneralizedRCNNTransform(1, 1, [0.0] * 3, [1.0] * 3, size_divisible=1, fixed_size=size[::-1])
        rest.backbone = _Given({name: some.new_zeros(shape) for name, shape in self._maps(size).items()})
        rest.head = _Given({name: found.float() for name, found in outputs.items()})
        with torch.no_grad():
            found: Sequence[Mapping[str, Tensor]] = rest([some.new_zeros(3, *size) for _ in some])
        return found

    def _maps(self, size: tuple[int, int]) -> Mapping[str, torch.Size]:
        """Shapes of the maps that the backbone gives for one image of a size: they place the anchors."""
        if size not in self._known:
            weight = next(self.detector.parameters())
            with torch.no_grad():
                maps = self.detector.backbone(weight.new_zeros(1, 3, *size))  # type: ignore[operator]
            self._known[size] = {name: found.shape for name, found in maps.items()}
        return self._known[size]

    @cached_property
    def _known(self) -> dict[tuple[int, int], Mapping[str, torch.Size]]:
        return {}


class _Given(nn.Module):
    """Gives a value, whatever it is called with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> Any:
        return self.value


def _require_detector(detector: nn.Module) -> None:
    if any(not hasattr(detector, part) for part in PARTS):
        raise ConfigError(
            f"A detector is an FCOS, RetinaNet or SSD of torchvision, but got {type(detector).__name__}. Take another "
            "model, and write its adapter: task.metric.adapter._target_=my.adapter."
        )
