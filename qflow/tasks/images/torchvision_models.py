"""Models of torchvision for classification and segmentation, with the preprocessing of their weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qflow.tasks.files.needs import needs
from qflow.tasks.files.weights import load_weights
from qflow.tasks.images.hub import from_hub
from qflow.tasks.images.own_models import scaled
from qflow.tasks.images.samples import Fit, ImageFiles

SIZE = (520, 520)  # of torchvision's references for segmentation


def build_model(
    *, name: str | None = None, pretrained: bool = True, weights: str | None = None, **more: Any
) -> nn.Module:
    """The model `name`, in eval mode; `weights` is a file, or one of torchvision's own names (IMAGENET1K_V1).

    `more` are arguments of the model's builder, such as num_classes. Raises ConfigError or ModelError in one line.
    """
    with needs("torchvision"):
        from torchvision import models
    named = weights is not None and weights.isidentifier() and not Path(weights).exists()
    chosen = weights if named else "DEFAULT" if pretrained and weights is None else None
    if "segmentation" in _home(models, name) and chosen is None:
        more = {"weights_backbone": None, **more}  # else the backbone's weights are downloaded
    names = "torchvision.models.list_models()"
    model = from_hub(lambda: models.get_model(name, weights=chosen, **more), name, chosen is not None, names)
    if weights is not None and not named:
        load_weights(model, weights)
    return model


def build_data(
    *, root: str | None = None, name: str | None = None, weights: str | None = None,
    size: Sequence[int] = SIZE, **settings: Any,
) -> ImageFiles:  # fmt: skip
    """The images in `root`, for a model by `name` and `weights`; `size` [height, width] is of segmentation."""
    return ImageFiles(root=root, fit=functools.partial(_fit, name=name, weights=weights, size=size), **settings)


def _fit(model: nn.Module, name: str | None, weights: str | None, size: Sequence[int]) -> Fit:
    with needs("torchvision"):
        from torchvision import models
    known = models.get_model_weights(name)
    entry = known[weights] if weights in known.__members__ else known.DEFAULT
    transform, names = entry.transforms(), [(name,) for name in entry.meta["categories"]]
    if "segmentation" in _home(models, name):
        return Fit(scaled(size, transform.mean, transform.std), None, names, dense=True)
    outputs = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    return Fit(transform, outputs[-1] if outputs else None, names)


def _home(models: Any, name: str | None) -> str:
    """The module that defines a model; "" for an unknown one."""
    try:
        return str(models.get_model_builder(name).__module__)
    except (ValueError, AttributeError):
        return ""
