"""Images as calibration and evaluation data: map-style, opened when they are read, with the model's own preprocessing.

Every chosen file is decoded once when the data are built. One that cannot be decoded is left out and named; the rest is
used. No image stays in memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import Dataset

from qflow.core.errors import DataError
from qflow.tasks.files.listing import Chosen, choose, class_of, classes_of, lines_of, numbered
from qflow.tasks.files.readable import note, readable
from qflow.tasks.files.sources import Source, source_of
from qflow.tasks.metrics.agreement import Agreement
from qflow.tasks.metrics.labels import MeanIoU, Top1

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IMAGES, MASKS = "images", "masks"
WITHOUT = "without labels the metric is agreement with float"


@dataclass(frozen=True)
class Fit:
    """What a model makes of images: its preprocessing, and its classes."""

    transform: Callable[[Image.Image], Tensor]
    """Image in RGB -> the model's input [C, H, W]."""
    outputs: int | None = None
    """Number of classes; None if it is not known."""
    names: Sequence[Sequence[str]] = ()
    """The names that each class goes by."""
    dense: bool = False
    """True if the model gives a class for each pixel."""
    by: str = "top1"
    """What agreement with float compares where there are no labels (agreement.py)."""


@dataclass(frozen=True)
class Files:
    """The names of a sample's files, and its class."""

    image: str
    mask: str = ""
    label: int | None = None

    def names(self) -> tuple[str, ...]:
        """The files that are read."""
        return (self.image, self.mask) if self.mask else (self.image,)


class Images(Dataset[Any]):
    """Samples `image [C, H, W]`, (image, class) or (image, classes [H, W] of its pixels)."""

    def __init__(self, source: Source, samples: Sequence[Files], transform: Callable[[Image.Image], Tensor]) -> None:
        self.source, self.samples, self.transform = source, samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        files = self.samples[index]
        image = self.transform(decoded(self.source, files.image).convert("RGB"))
        if files.mask:
            height, width = image.shape[-2:]
            mask = np.array(decoded(self.source, files.mask).resize((width, height), Image.Resampling.NEAREST))
            if mask.ndim != 2:
                raise DataError(
                    f"A mask holds one class number a pixel, but got {files.mask} with {mask.shape[2]} channels. Save "
                    "it in gray or with a palette."
                )
            return image, torch.from_numpy(mask).long()
        return image if files.label is None else (image, files.label)


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """The data of a task, as make_task takes them."""

    calibration: Images
    evaluation: Images
    workers: int = 0
    notes: tuple[str, ...] = ()
    unlabelled: str = ""
    """Why there are no labels; "" if there are."""
    unfit: bool = False
    """True if there are class folders, which cannot be the model's outputs."""
    metric: Any
    """The metric of a task that names none: that of the labels, or agreement with float where there are none."""

    def own_metric(self) -> Any:
        """The metric of a task that names none. Raises DataError for class folders that cannot be the outputs."""
        if self.unfit:
            raise DataError(
                f"Class folders are the outputs of the model, but got other ones: {self.unlabelled}. Give the names, "
                "or judge without labels: metric=agreement."
            )
        return self.metric


@dataclass(frozen=True, kw_only=True)
class ClassifiedImages(ImageData):
    """Images with a class each."""

    def sample_classes(self, batch: Any) -> list[int]:
        """The class of each sample, for the rule of promote on the worst class."""
        return [int(label) for label in batch[1]]


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Images before their model is known."""

    root: str | None
    fit: Callable[[nn.Module], Fit]
    calibration_size: int = 256
    evaluation_size: int | None = None
    classes: str | None = None
    """Text file with the class folder of each output, one a line; of masks, the name of each class."""
    ignore_index: int = 255
    workers: int = 0

    def for_model(self, model: nn.Module) -> ImageData:
        """The data with the model's preprocessing. Raises DataError for images that cannot be used."""
        fit, source, root = self.fit(model), source_of(self.root), str(self.root)
        names = [name for name in source.names if name.lower().endswith(ENDINGS)]
        if not names:
            raise DataError(
                f"task.data.root holds images ({' '.join(ENDINGS)}), but got none in {root}. Check the path."
            )
        return self._dense(fit, source, names) if fit.dense else self._classified(fit, source, names)

    def _classified(self, fit: Fit, source: Source, names: list[str]) -> ImageData:
        chosen = choose(names, self.calibration_size, self.evaluation_size, str(self.root))
        tops = {name.split("/")[0] for name in (*chosen.calibration, *chosen.evaluation)}
        every = [name for name in names if not chosen.depth or name.split("/")[0] in tops]
        folders = classes_of(source, every, chosen.depth, str(self.root))
        place, said = numbered(folders, fit.outputs, fit.names, self.classes) if folders else ({}, "no class folders")
        splits = [
            [Files(name, label=place.get(class_of(name, chosen.depth)) if place else None) for name in part]
            for part in (chosen.calibration, chosen.evaluation)
        ]
        made, notes = self._made(fit, source, splits, chosen)
        if place:
            return ClassifiedImages(**made, notes=(*notes, note("labels", said)), metric=Top1())
        why = said if folders else f"{self.root} has no class folders"
        notes = (*notes, note("labels", f"{why}; {WITHOUT}"))
        return ImageData(**made, notes=notes, unlabelled=why, unfit=bool(folders), metric=Agreement(by=fit.by))

    def _dense(self, fit: Fit, source: Source, names: list[str]) -> ImageData:
        paired = [name for name in names if MASKS not in name.split("/")[:-1]]
        masks = {_stem(name): name for name in names if MASKS in name.split("/")[:-1]}
        pairs = {name: masks.get(_stem(name), "") for name in paired}
        if masks and (alone := [name for name, mask in pairs.items() if not mask]):
            raise DataError(
                f"Each image in {IMAGES}/ has a mask of its name in {MASKS}/, but got {alone[0]} without one in "
                f"{self.root} ({len(alone)} such images). Add it, or take the image out."
            )
        chosen = choose(paired, self.calibration_size, self.evaluation_size, str(self.root))
        splits = [[Files(name, pairs[name]) for name in part] for part in (chosen.calibration, chosen.evaluation)]
        made, notes = self._made(fit, source, splits, chosen)
        if masks:
            known = lines_of(self.classes) if self.classes else [names[0] for names in fit.names]
            return ImageData(**made, notes=notes, metric=MeanIoU(ignore_index=self.ignore_index, classes=known))
        why = f"{self.root} has no folder {MASKS}"
        notes = (*notes, note("labels", f"{why}; {WITHOUT}"))
        return ImageData(**made, notes=notes, unlabelled=why, metric=Agreement(by="pixels"))

    def _made(
        self, fit: Fit, source: Source, splits: list[list[Files]], chosen: Chosen
    ) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The splits without files that cannot be decoded, and what is said of them."""
        kept, notes = readable(
            splits, Files.names, lambda n: broken(source, n), root=str(self.root), workers=self.workers
        )
        calibration, evaluation = (Images(source, files, fit.transform) for files in kept)
        made = {"calibration": calibration, "evaluation": evaluation, "workers": self.workers}
        return made, (note("data", f"{self.root}: {chosen.said}"), *notes)


def decoded(source: Source, name: str) -> Image.Image:
    """An image of a source, as it is stored. Raises DataError, which names the file."""
    try:
        image = Image.open(io.BytesIO(source.read(name)))
        image.load()
    except Exception as error:  # Pillow's plugins raise many types for what is damaged
        raise DataError(
            f"An image is a file that Pillow decodes, but got {name}: {_why(error)}. Replace it."
        ) from error
    return image


def broken(source: Source, name: str) -> str:
    """Why a file is no image; "" for an image."""
    try:
        decoded(source, name)
    except DataError as error:
        return _why(error.__cause__)
    return ""


def _why(error: BaseException | None) -> str:
    return "no image" if isinstance(error, UnidentifiedImageError) else " ".join(str(error).split())[:80]


def _stem(name: str) -> str:
    """What an image has in common with its mask: the name without the folder of either and without the ending."""
    *folders, file = name.split("/")
    return "/".join([*(f for f in folders if f not in (IMAGES, MASKS)), file.rpartition(".")[0]])
