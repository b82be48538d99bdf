"""Real networks with random weights for `benchmarks.real_models`: timm, torchvision, transformers, and a detector.

Batch norms get the statistics of the images they are timed on (`revive`), so that values neither vanish nor explode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import Residual, conv_bn, images, revive

Inputs = Any
"""A tensor, or a dict of keyword arguments."""


def build(name: str, batch: int) -> tuple[nn.Module, Inputs]:
    """The named network in eval mode, and `batch` inputs for it."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    try:
        from support.torchvision_ops import declare
    finally:
        sys.path.pop()
    declare()
    make, side = NETWORKS[name]
    torch.manual_seed(0)
    model = make().eval()
    if not side:
        return model, _text(batch)
    pictures = images(batch, (3, side, side), seed=5)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        wanted = {"pixel_values": pictures} if name == "segformer" else pictures
        model = _revived(model, wanted)
    return model, {"pixel_values": pictures} if name == "segformer" else pictures


class _Called(nn.Module):
    """A network that takes its inputs as one value."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Inputs) -> Any:
        return self.model(**x) if isinstance(x, dict) else self.model(x)


def _revived(model: nn.Module, inputs: Inputs) -> nn.Module:
    revive(_Called(model), inputs)
    return model.eval()


def _timm(name: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, pretrained=False, **more)
        return model

    return make


def _deeplab() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    model: nn.Module = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=21)
    return model


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    model: nn.Module = SegformerForSemanticSegmentation(SegformerConfig(num_labels=19))
    return model


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024)
    model: nn.Module = BertForSequenceClassification(config)
    return model


def _text(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(batch, 64, dtype=torch.long)
    mask[0, 48:] = 0
    return {"input_ids": torch.randint(0, 30000, (batch, 64), generator=generator), "attention_mask": mask}


class Conv(nn.Module):
    """Convolution, batch norm, and the one activation object of all blocks, as YOLO's blocks have it."""

    act = nn.SiLU()

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(inside, outside, kernel, stride)
        self.activation = self.act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activation(self.bn(self.conv(x)))
        return y


class C2f(nn.Module):
    """Split in two; every bottleneck's result enters the concat."""

    def __init__(self, inside: int, outside: int, count: int) -> None:
        super().__init__()
        half = outside // 2
        self.first, self.last = Conv(inside, outside), Conv((2 + count) * half, outside)
        self.blocks = nn.ModuleList(nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        y: Tensor = self.last(torch.cat(parts, 1))
        return y


class Detector(nn.Module):
    """The backbone, neck and raw heads of YOLOv8-n: widths 16 to 256, depths 1-2-2-1, three scales."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        widths, depths = (16, 32, 64, 128, 256), (1, 2, 2, 1)
        self.stem = Conv(3, 16, 3, 2)
        self.down = nn.ModuleList(Conv(a, b, 3, 2) for a, b in zip(widths, widths[1:], strict=False))
        self.stages = nn.ModuleList(C2f(w, w, d) for w, d in zip(widths[1:], depths, strict=True))
        self.pool, self.before, self.behind = nn.MaxPool2d(5, 1, 2), Conv(256, 128), Conv(512, 256)
        self.up = nn.Upsample(scale_factor=2.0)
        self.join = nn.ModuleList([C2f(384, 128, 1), C2f(192, 64, 1), C2f(192, 128, 1), C2f(384, 256, 1)])
        self.again = nn.ModuleList([Conv(64, 64, 3, 2), Conv(128, 128, 3, 2)])
        self.box = nn.ModuleList(self._head(w, 64, 64) for w in (64, 128, 256))
        self.cls = nn.ModuleList(self._head(w, 80, classes) for w in (64, 128, 256))

    @staticmethod
    def _head(inside: int, inner: int, outside: int) -> nn.Sequential:
        return nn.Sequential(Conv(inside, inner, 3), Conv(inner, inner, 3), nn.Conv2d(inner, outside, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, scales = self.stem(x), []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            scales.append(x)
        pooled = [self.before(x)]
        for _ in range(3):
            pooled.append(self.pool(pooled[-1]))
        deep = self.behind(torch.cat(pooled, 1))
        middle = self.join[0](torch.cat([self.up(deep), scales[2]], 1))
        fine = self.join[1](torch.cat([self.up(middle), scales[1]], 1))
        middle = self.join[2](torch.cat([self.again[0](fine), middle], 1))
        deep = self.join[3](torch.cat([self.again[1](middle), deep], 1))
        levels = zip((fine, middle, deep), self.box, self.cls, strict=True)
        return [torch.cat([box(level), cls(level)], 1) for level, box, cls in levels]


def _tiny() -> nn.Module:
    """For trying the benchmark itself."""
    return nn.Sequential(*conv_bn(3, 8, 3, 2), nn.ReLU(), Residual(8, 8, 1), nn.Flatten(), nn.Linear(8 * 256, 4))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet50": (_timm("resnet50"), 128),
    "mobilenetv3": (_timm("mobilenetv3_large_100"), 160),
    "efficientnet_lite0": (_timm("efficientnet_lite0"), 160),
    "swin_tiny": (_timm("swin_tiny_patch4_window7_224"), 224),
    "vit_tiny": (_timm("vit_tiny_patch16_224"), 224),
    "convnext_atto": (_timm("convnext_atto"), 160),
    "yolo": (Detector, 160),
    "deeplabv3": (_deeplab, 128),
    "segformer": (_segformer, 128),
    "bert": (_bert, 0),
    "tiny": (_tiny, 32),
}
"""Name -> what makes the network, and the side of its square images (0: text)."""
