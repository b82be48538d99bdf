"""Pictures with COCO annotations as the data of a task: letterboxed inputs, and the boxes of the original pictures.

A sample is (image, truth): the image is float32 [3, height, width], the truth a dict

    index        int64 [], the picture's place in the annotation file by its id
    place        float64 [5], how the picture lies in the image (`Letterbox.place`)
    boxes        float64 [K, 4], left, top, width, height in pixels of the picture
    categories   int64 [K], category ids
    crowd        bool [K]
    areas        float64 [K], in pixels

A batch is (images [B, 3, height, width], list of B truths). Pictures are read when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from qflow.core.errors import ConfigError, DataError
from qflow.tasks.detection.annotations import Picture, read
from qflow.tasks.detection.boxes import letterbox
from qflow.tasks.files.readable import note, readable


class Truth(TypedDict):
    """The truth of one picture; see the module."""

    index: Tensor
    place: Tensor
    boxes: Tensor
    categories: Tensor
    crowd: Tensor
    areas: Tensor


Look = tuple[Tensor, Tensor, int]
"""Mean and standard deviation float32 [3, 1, 1] of RGB in 0 to 1, and the gray of the border in 0 to 255."""
Placed = tuple[int, Picture]
"""A picture with its place in the annotation file by its id."""
Sample = tuple[Tensor, Truth]
Batch = tuple[Tensor, list[Truth]]


class Pictures(Dataset[Sample]):
    """Annotated pictures of a folder, as samples of the module's form."""

    def __init__(self, pictures: Sequence[Placed], size: tuple[int, int], look: Look) -> None:
        """Take (index, picture) pairs."""
        self.pictures, self.size, self.look = pictures, size, look

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        place, picture = self.pictures[index]
        mean, deviation, border = self.look
        image = opened(picture)
        fit = letterbox(image.size, self.size)
        canvas = Image.new("RGB", self.size[::-1], (border, border, border))
        canvas.paste(image.resize(fit.scaled, Image.Resampling.BILINEAR), fit.corner)
        pixels = torch.from_numpy(np.asarray(canvas).transpose(2, 0, 1).copy()).float() / 255
        return (pixels - mean) / deviation, {
            "index": torch.tensor(place),
            "place": fit.place,
            "boxes": torch.tensor(picture.boxes, dtype=torch.float64).reshape(-1, 4),
            "categories": torch.tensor(picture.categories, dtype=torch.int64),
            "crowd": torch.tensor(picture.crowd, dtype=torch.bool),
            "areas": torch.tensor(picture.areas, dtype=torch.float64),
        }


def opened(picture: Picture) -> Image.Image:
    """The decoded picture in RGB, turned as the camera says if its annotations are for that.

    Raises whatever PIL raises, and DataError for another size than that of the annotations.
    """
    with Image.open(picture.file) as file:
        image: Image.Image = file
        if picture.size not in (None, file.size):
            image = ImageOps.exif_transpose(file) or file
        if picture.size not in (None, image.size):
            raise DataError(f"{image.width}x{image.height} instead of {picture.size[0]}x{picture.size[1]}")  # type: ignore[index]
        return image.convert("RGB")


class CocoData:
    """The splits of a folder of pictures with COCO annotations.

    Without `train_annotations` some pictures are only calibrated on, and all others evaluated. Pictures that cannot be
    read are left out, counted and named in `notes`.
    """

    def __init__(
        self,
        annotations: str | None,
        root: str | None,
        *,
        size: int | Sequence[int] = 640,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        border: int = 114,
        calibration_size: int = 256,
        evaluation_size: int | None = None,
        train_annotations: str | None = None,
        train_root: str | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Read the annotations and try every picture that is used.

        `size` is the input of the network, height and width or one number for both; `mean` and `std` are those of RGB
        in 0 to 1, `border` is the gray (0 to 255) around a picture. `calibration_size` pictures are drawn by `seed`
        from `train_annotations` and `train_root`, or else from the evaluated ones, of which `evaluation_size` stay
        (None: all). `workers` are processes that load batches. Raises ConfigError and DataError.
        """
        if annotations is None or root is None:
            raise ConfigError(
                "A detection task has pictures and boxes, but got none. Set task.data.annotations and task.data.root."
            )
        self.workers, self._size = workers, _checked(size, mean, std)
        middle, spread = (torch.tensor(v, dtype=torch.float32).reshape(3, 1, 1) for v in (mean, std))
        self._look = middle, spread, border
        found = read(annotations, root)
        order = _shuffled(found.pictures, seed)
        said = f"{annotations}: {len(found.pictures)} pictures"
        if train_annotations is None:
            calibration, evaluated = order[:calibration_size], order[calibration_size:]
            said += f", of which {len(calibration)} calibrate"
        else:
            calibration, evaluated = _shuffled(read(train_annotations, train_root or root).pictures, seed), order
        splits = [calibration, sorted(evaluated[:evaluation_size], key=lambda pair: pair[0])]
        (calibration, evaluated), left_out = _kept(splits, root, workers)
        if train_annotations is not None:
            self.train = Pictures(calibration, self._size, self._look)
        self.calibration = Pictures(calibration[:calibration_size], self._size, self._look)
        self.evaluation = Pictures(evaluated, self._size, self._look)
        _require_boxes(evaluated, annotations)
        strays = [note("data", f"{found.strays} annotations belong to none of the pictures")] if found.strays else []
        self.notes = (note("data", said), *left_out, *strays)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        """A batch of samples."""
        return collated(samples)


def collated(samples: Sequence[Sample]) -> Batch:
    """Stack the images; the truths stay a list, because each has its own number of boxes."""
    return torch.stack([image for image, _ in samples]), [truth for _, truth in samples]


def _kept(splits: Sequence[Sequence[Placed]], root: str, workers: int) -> tuple[list[list[Placed]], list[str]]:
    """What of the splits can be read, and a note on the rest."""
    pictures = {picture.file: picture for split in splits for _, picture in split}
    return readable(
        splits, lambda pair: [pair[1].file], lambda file: _broken(pictures[file]), root=root, workers=workers
    )


def _require_boxes(pictures: Sequence[Placed], annotations: str) -> None:
    if all(all(picture.crowd) for _, picture in pictures):
        raise DataError(
            f"An evaluation of boxes needs some to find, but got none in {len(pictures)} pictures of {annotations}. "
            "Check the file, or take fewer for calibration: task.data.calibration_size."
        )


def _checked(size: int | Sequence[int], mean: Sequence[float], std: Sequence[float]) -> tuple[int, int]:
    """Height and width. Raises ConfigError for another size than that, or other than three means and deviations."""
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(
            f"task.data has a size (height, width) and three means and deviations above 0, but got {list(sides)}, "
            f"{list(mean)}, {list(std)}. Write size=[480,640]."
        )
    return sides[0], sides[1]


def _shuffled(pictures: Sequence[Picture], seed: int) -> list[Placed]:
    """(index, picture) pairs in an order that is drawn by `seed`."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(index, pictures[index]) for index in order]


def _broken(picture: Picture) -> str:
    """Why a picture cannot be used; empty if it can."""
    try:
        opened(picture)
    except Exception as error:  # PIL raises many types for broken files
        return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
    return ""
