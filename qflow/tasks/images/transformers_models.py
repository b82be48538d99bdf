"""Models of Hugging Face's transformers for images, with their own image processor (`task=huggingface`)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from qflow.core.errors import ConfigError
from qflow.tasks.files.needs import needs
from qflow.tasks.files.weights import load_weights
from qflow.tasks.images.hub import from_hub
from qflow.tasks.images.samples import Fit, ImageFiles

DENSE = "SemanticSegmentation"
OWN_CODE = {"trust_remote_code": False}  # a repository of the hub may hold code, which is never run


class Logits(nn.Module):
    """A model of transformers that takes images and returns its scores alone."""

    def __init__(self, model: nn.Module, dense: bool) -> None:
        super().__init__()
        self.model, self.dense = model, dense

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> scores [B, classes], or [B, classes, h, w]."""
        scores: Tensor = self.model(pixel_values=pixel_values).logits
        return scores


def build_model(
    *, name: str | None = None, pretrained: bool = True, weights: str | None = None, **more: Any
) -> nn.Module:
    """The model of a hub's name or of a folder, in eval mode; it classifies images, or their pixels.

    `more` are arguments of its configuration. Raises ConfigError or ModelError in one line.
    """
    with needs("huggingface"):
        import transformers as library
    download = pretrained and weights is None

    def build() -> nn.Module:
        library.utils.logging.disable_progress_bar()
        config = library.AutoConfig.from_pretrained(name, **more, **OWN_CODE)
        dense = any(DENSE in text for text in config.architectures or ())
        kind = library.AutoModelForSemanticSegmentation if dense else library.AutoModelForImageClassification
        found = (
            kind.from_pretrained(name, config=config, **OWN_CODE) if download else kind.from_config(config, **OWN_CODE)
        )
        if weights is not None:
            load_weights(found, weights)
        return Logits(found, dense)

    otherwise = "Name a folder that holds them: task.model.name=<folder>."
    return from_hub(build, name, download, "the names of huggingface.co/models, or a folder", otherwise)


def build_data(*, root: str | None = None, name: str | None = None, **settings: Any) -> ImageFiles:
    """The images in `root`, with the image processor of the model `name`."""
    return ImageFiles(root=root, fit=functools.partial(_fit, name=name), **settings)


def _fit(model: nn.Module, name: str | None) -> Fit:
    with needs("huggingface"):
        from transformers import AutoImageProcessor
    if not isinstance(model, Logits):
        raise ConfigError(f"task=huggingface takes its own model, but got {type(model).__name__}. Use task=custom.")
    try:
        processor = AutoImageProcessor.from_pretrained(name, **OWN_CODE)
    except Exception as error:  # the library and the hub's client raise many types
        text = " ".join(str(error).split())[:160]
        raise ConfigError(f"A model for images has an image processor, but got none for {name}: {text}.") from error
    config: Any = model.model.config
    names = [(config.id2label[i], *config.id2label[i].split(", ")[:1]) for i in range(config.num_labels)]
    return Fit(functools.partial(_processed, processor), int(config.num_labels), names, dense=model.dense)


def _processed(processor: Any, image: Image.Image) -> Tensor:
    found = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return torch.as_tensor(found)
