"""Models of timm with the preprocessing that timm defines for each (`task=timm`)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from qflow.core.errors import ConfigError, ModelError
from qflow.tasks.files.needs import needs
from qflow.tasks.files.weights import load_weights
from qflow.tasks.images.hub import from_hub
from qflow.tasks.images.samples import Fit, ImageFiles

FILES = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
"""Arguments of timm.create_model that name files."""
_LOCAL = re.compile(r"\s*local[-_]dir\s*:", re.IGNORECASE)  # timm's prefix for a folder, in any case


def build_model(
    *, name: str | None = None, pretrained: bool = True, weights: str | None = None, **more: Any
) -> nn.Module:
    """The model `name`, in eval mode, with the weights of a file, of timm's hub, or random ones.

    `more` are arguments of timm.create_model, such as num_classes. Raises ConfigError or ModelError in one line.
    """
    with needs("timm"):
        import timm
    if odd := [text for text in (name or "", *sorted(more)) if text in FILES or _LOCAL.match(text)]:
        raise ConfigError(
            f"Weights from a file are task.model.weights, but got {odd[0]}. Set task.model.weights=<file>."
        )
    download = pretrained and weights is None
    names = "timm.list_models()"
    model = from_hub(lambda: timm.create_model(name, pretrained=download, **more), name, download, names)
    if weights is not None:
        load_weights(model, weights)
    return model


def build_data(*, root: str | None = None, **settings: Any) -> ImageFiles:
    """The images in `root`: class folders, or a flat folder without labels; `settings` are those of ImageFiles."""
    return ImageFiles(root=root, fit=fit, **settings)


def fit(model: nn.Module) -> Fit:
    """What timm's own configuration says of the model. Raises ModelError for a model of another library."""
    with needs("timm"):
        from timm import data
    known: Any = getattr(model, "pretrained_cfg", None)
    if known is None:
        raise ModelError(f"task=timm takes a model of timm, but got {type(model).__name__}. Use task=custom.")
    transform = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    subset, count, names = data.infer_imagenet_subset(model), int(getattr(model, "num_classes", 0)), []
    if subset and count == known.get("num_classes"):
        info = data.ImageNetInfo(subset)
        names = [(info.index_to_label_name(i), info.index_to_description(i)) for i in range(info.num_classes())]
    return Fit(transform, count, names)
