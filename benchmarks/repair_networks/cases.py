"""The networks of the benchmark as tasks, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.networks import ResNet
from benchmarks.planted import EVALUATION, pictures
from benchmarks.repair_networks import classifiers, faces
from benchmarks.repair_networks.data import MeanIoU, items, scenes, splits
from benchmarks.repair_networks.dense import DepthwiseDetector, SegmentationNet
from benchmarks.repair_networks.training import Recipe, trained
from qflow.tasks import digits, dual, exposure
from qflow.tasks.digits import Accuracy
from qflow.tasks.perception import data as perception_data
from qflow.tasks.perception import metric as perception_metric
from qflow.tasks.perception import model as perception_model
from qflow.tasks.task import Task, make_task

DECADES = 1.5  # channels of the planted ResNet-20 are rescaled by 10**-1.5 to 10**1.5


@dataclass(frozen=True)
class Size:
    """How much of everything: samples to calibrate with and to evaluate, and whether networks are trained."""

    calibration: int = 128
    evaluation: int = 768
    trained: bool = True

    def epochs(self, count: int) -> int:
        """`count`, or 0 if networks are not trained."""
        return count if self.trained else 0


SMALL = Size(calibration=16, evaluation=32, trained=False)


@dataclass(frozen=True)
class Places:
    """Where trained weights are kept, and where the wheels of R-Net are."""

    weights: Path
    wheels: Path | None = None


@dataclass(frozen=True)
class Case:
    """A network of the benchmark."""

    build: Callable[[Size, Places], Task]
    words: str
    located: bool = False
    """Its answer has places: a detector or a segmenter."""


def _cross_entropy(outputs: Any, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def _item_classifier(name: str, network: Callable[[], nn.Module], epochs: int, rate: float = 4e-3) -> Any:
    def build(size: Size, places: Places) -> Task:
        train, test = items()
        recipe = Recipe(name, network, lambda: train.tensors, _cross_entropy, size.epochs(epochs), rate, mirrored=True)
        return _task(name, trained(recipe, places.weights), splits(train, test, size.calibration, size.evaluation))

    return build


def _task(name: str, model: nn.Module, data: Any, metric: Any = None, shape: tuple[int, ...] | None = None) -> Task:
    return make_task(name=name, model=model, data=data, metric=metric or Accuracy(), deploy_shape=shape)


def _with_outliers(size: Size, places: Places) -> Task:
    task = TRANSFORMER(size, places)
    assert isinstance(task.model, classifiers.VisionTransformer)
    return _task("vit_outliers", classifiers.with_outliers(task.model), task.data)


TRANSFORMER = _item_classifier("vit", classifiers.VisionTransformer, 3, 2e-3)


def _planted_resnet(size: Size, places: Places) -> Task:
    data = pictures(16, 3)
    rest = TensorDataset(*(tensor[EVALUATION:] for tensor in data.tensors))
    recipe = Recipe("resnet20-16", ResNet, lambda: rest.tensors, _cross_entropy, size.epochs(8))
    model = trained(recipe, places.weights)
    assert isinstance(model, ResNet)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in (model.blocks[i] for i in (1, 4, 7)):
            count = len(block.bn1.weight)  # type: ignore[arg-type,union-attr]
            order = torch.randperm(count, generator=generator)
            factors = 10 ** torch.linspace(-DECADES, DECADES, count)[order]
            block.bn1.weight *= factors  # type: ignore[operator,union-attr]
            block.bn1.bias *= factors  # type: ignore[operator,union-attr]
            block.conv2.weight /= factors[:, None, None]  # type: ignore[operator,union-attr]
    return _task("resnet20_planted", model, splits(rest, data, size.calibration, min(size.evaluation, EVALUATION)))


def _segmentation(size: Size, places: Places) -> Task:
    train, test = items()
    recipe = Recipe(
        "segmentation",
        SegmentationNet,
        lambda: scenes(train, 2400, seed=0).tensors,
        lambda outputs, batch: F.cross_entropy(outputs, batch[1]),  # type: ignore[arg-type]
        size.epochs(2),
        batch=32,
    )
    model = trained(recipe, places.weights)
    count = min(size.evaluation, 256)
    data = splits(scenes(train, size.calibration, 1), scenes(test, count, 2), size.calibration, count)
    return _task("segmentation", model, data, MeanIoU())


def _perception(size: Size, places: Places) -> Task:
    data = perception_data.build_data(calibration_size=size.calibration, evaluation_size=min(size.evaluation, 512))
    return _task("perception", perception_model.build_model(), data, perception_metric.Found(), (1, 3, 384, 640))


def _detector(size: Size, places: Places) -> Task:
    data = perception_data.build_data(calibration_size=size.calibration, evaluation_size=min(size.evaluation, 512))

    def samples() -> Sequence[Tensor]:
        images, boxes = data.train.rendered
        return images.float() / perception_data.WHITE, data.train.labels, boxes

    def loss(outputs: Any, batch: Sequence[Tensor]) -> Tensor:
        return perception_metric.loss(outputs, (batch[0], {"label": batch[1], "box": batch[2]}))

    recipe = Recipe("detector_dw", DepthwiseDetector, samples, loss, size.epochs(2), 6e-3)
    model = trained(recipe, places.weights)
    return _task("detector_dw", model, data, perception_metric.Found(iou=0.5), (1, 3, 384, 640))


def _faces(size: Size, places: Places) -> Task:
    assert places.wheels is not None
    model = faces.rnet(places.wheels)
    images, face = faces.crops(places.wheels)
    with torch.no_grad():
        scores, boxes = model(images)
    sure = face == (scores[:, 1] > scores[:, 0])
    held = torch.arange(len(images)) % 2 == 1  # every second picture calibrates; each has crops of its own
    evaluation, calibration = (TensorDataset(images[p], boxes[p], face[p]) for p in (held & sure, ~held))
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
    calibration = TensorDataset(*(tensor[order] for tensor in calibration.tensors))
    return _task("rnet", model, splits(calibration, evaluation, size.calibration, size.evaluation), faces.Boxes())


def _built_in(name: str, model: Callable[[], nn.Module], data: Callable[..., Any]) -> Any:
    def build(size: Size, places: Places) -> Task:
        held = data(calibration_size=size.calibration)
        return _task(
            name,
            model(),
            SimpleNamespace(
                calibration=held.calibration,
                evaluation=TensorDataset(*(tensor[: size.evaluation] for tensor in held.evaluation.tensors)),
            ),
        )

    return build


CASES: dict[str, Case] = {
    "perception": Case(_perception, "detector, SiLU, concat; built in", located=True),
    "exposure": Case(_built_in("exposure", exposure.build_model, exposure.build_data), "RMS norm by hand; built in"),
    "dual": Case(_built_in("dual", dual.build_model, digits.build_data), "digits with rescaled channels; built in"),
    "resnet20_planted": Case(_planted_resnet, "ResNet-20 with rescaled channels in three blocks"),
    "mobilenet": Case(_item_classifier("mobilenet", classifiers.mobilenet, 3), "MobileNetV2, narrow, ReLU6"),
    "efficientnet": Case(
        _item_classifier("efficientnet", classifiers.efficientnet, 2), "EfficientNet, narrow, SiLU, gates"
    ),
    "vit": Case(TRANSFORMER, "vision transformer of four layers"),
    "vit_outliers": Case(_with_outliers, "the same, three channels of each layer norm x 64"),
    "detector_dw": Case(_detector, "depthwise detector on the pictures of perception", located=True),
    "segmentation": Case(_segmentation, "U-Net on composed scenes", located=True),
    "rnet": Case(_faces, "MTCNN's R-Net, published weights", located=True),
}
