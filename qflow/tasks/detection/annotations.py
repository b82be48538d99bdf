"""Reading of a COCO annotation file: its categories, its pictures, and the boxes of each picture.

A picture without annotations is one without boxes. Ids may have gaps. A crowd box (`iscrowd`: 1) marks a place where
detections count neither for nor against a model.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qflow.core.errors import DataError

KEYS = ("images", "annotations", "categories")


@dataclass(frozen=True)
class Picture:
    """A picture with its annotations; all lists have one entry a box."""

    file: str
    """Path of the file."""
    size: tuple[int, int] | None
    """Width and height as the annotations say; None if they do not."""
    boxes: list[list[float]]
    """Left, top, width, height in pixels of the picture."""
    categories: list[int]
    """Category ids."""
    crowd: list[bool]
    areas: list[float]
    """Area in pixels, by which COCO tells small, medium and large; that of the mask where the file has one."""


@dataclass(frozen=True)
class Annotations:
    """What an annotation file holds."""

    pictures: list[Picture]
    """In the order of their ids, which is that of COCO's evaluation."""
    categories: dict[int, str]
    """Id -> name, in the order of the ids."""
    strays: int
    """Number of annotations whose picture is not in the file."""


def read(path: str | Path, root: str | Path = "") -> Annotations:
    """Read a COCO annotation file, whose pictures lie in `root`. Raises DataError, which names the file, else."""
    content = _content(Path(os.path.expanduser(path)))
    try:
        categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        found: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
        strays = 0
        for annotation in content["annotations"]:
            if annotation["image_id"] in found:
                found[annotation["image_id"]].append(annotation)
            else:
                strays += 1
        pictures = [_picture(images[key], found[key], categories, Path(root)) for key in sorted(images)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DataError(f"A COCO file describes images, boxes and categories, but got {text} in {path}.") from error
    return Annotations(pictures, dict(sorted(categories.items())), strays)


def _content(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        text = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"Annotations are a COCO file in JSON, but got {path}: {text}. Correct the path.") from error
    lacks = [key for key in KEYS if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacks:
        raise DataError(f"Annotations are a COCO file with lists {', '.join(KEYS)}, but got no {lacks[0]} in {path}.")
    return content


def _picture(
    image: dict[str, Any], annotations: list[dict[str, Any]], categories: dict[int, str], root: Path
) -> Picture:
    boxes = [[float(v) for v in a["bbox"]] for a in annotations]
    for box, annotation in zip(boxes, annotations, strict=True):
        if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
            raise ValueError(f"the box {annotation['bbox']} for left, top, width, height")
        if annotation["category_id"] not in categories:
            raise ValueError(f"the unknown category {annotation['category_id']!r}")
    size = (int(image["width"]), int(image["height"])) if "width" in image and "height" in image else None
    return Picture(
        file=str(Path(os.path.expanduser(root)) / image["file_name"]),
        size=size,
        boxes=boxes,
        categories=[int(a["category_id"]) for a in annotations],
        crowd=[bool(a.get("iscrowd", 0)) for a in annotations],
        areas=[float(a.get("area", box[2] * box[3])) for a, box in zip(annotations, boxes, strict=True)],
    )
