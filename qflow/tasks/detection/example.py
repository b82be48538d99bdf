"""A folder of drawn pictures with COCO annotations, on which a small detector learns within a minute.

Discs, squares and triangles, each with a colour of its own, lie on a smooth ground with noise: small, medium and large
as COCO counts, some partly behind others. A few pictures are empty, and some hold a crowd of small discs that is marked
by one box. The ids of categories and pictures have gaps.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

CATEGORIES = {2: "disc", 3: "square", 7: "triangle"}  # ids as in a file from which others were taken out
COLOURS = {2: (220, 90, 60), 3: (60, 120, 230), 7: (80, 200, 90)}
SHAPES = ((160, 120), (120, 160), (128, 128))  # width, height of pictures
SIDES = (20.0, 140.0)  # pixels of an object, drawn log-uniformly
EMPTY, CROWDED = 0.08, 0.12  # shares of pictures


def write_example(folder: str | Path, pictures: int, seed: int = 0) -> Path:
    """Write `pictures` drawn pictures to images/ in `folder`, and instances.json, whose path is returned."""
    for name, content in example_files(pictures, seed):
        file = Path(folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return Path(folder) / "instances.json"


def example_files(pictures: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield the name of each file, below the folder, and its content; everything follows from `seed`."""
    random = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(pictures):
        picture, boxes = _picture(random)
        name, id_ = f"{number:04d}.jpg", 3 * number + 1
        images.append({"id": id_, "file_name": name, "width": picture.width, "height": picture.height})
        annotations += [{"id": len(annotations) + k, "image_id": id_, **box} for k, box in enumerate(boxes, 1)]
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=90)
        yield f"images/{name}", stream.getvalue()
    categories = [{"id": key, "name": name} for key, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    yield "instances.json", json.dumps(content).encode()


def _picture(random: np.random.Generator) -> tuple[Image.Image, list[dict[str, Any]]]:
    """One picture and its annotations, without ids."""
    width, height = SHAPES[random.integers(len(SHAPES))]
    coarse = Image.fromarray((random.integers(60, 160, (4, 4, 1)) + random.integers(0, 20, (4, 4, 3))).astype(np.uint8))
    ground = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    picture = Image.fromarray((ground + random.normal(0, 4, ground.shape)).clip(0, 255).astype(np.uint8))
    draw, chance, found = ImageDraw.Draw(picture), random.random(), []
    if chance < EMPTY:
        return picture, []
    if chance < EMPTY + CROWDED:
        left, top, right, bottom = _place(random, width, height, 48.0)
        for x, y in random.uniform((left + 4, top + 4), (right - 4, bottom - 4), (20, 2)):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), COLOURS[2])
        found.append(_annotation(2, (left, top, right, bottom), crowd=1))
    least, most = map(math.log, SIDES)
    sides = np.exp(random.uniform(least, most, int(random.integers(1, 4))))
    for side in sorted(sides.tolist(), reverse=True):  # the small ones lie in front
        category = int(random.choice(list(CATEGORIES)))
        box = _place(random, width, height, side)
        shade = random.uniform(0.8, 1.1)
        colour = tuple(min(int(value * shade), 255) for value in COLOURS[category])
        if category == 2:
            draw.ellipse(box, colour)
        elif category == 3:
            draw.rectangle(box, colour)
        else:
            draw.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], colour)
        found.append(_annotation(category, box, crowd=0))
    return picture, found


def _place(random: np.random.Generator, width: int, height: int, side: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a box about `side` long, inside the picture."""
    extent = np.minimum(side * random.uniform(0.8, 1.25, 2), (width - 2, height - 2)).round()
    left, top = (random.uniform(0, 1, 2) * ((width, height) - extent - 1)).round()
    return float(left), float(top), float(left + extent[0]), float(top + extent[1])


def _annotation(category: int, box: tuple[float, float, float, float], crowd: int) -> dict[str, Any]:
    left, top, right, bottom = box
    width, height = right - left + 1, bottom - top + 1  # PIL draws the last row and column too
    share = {2: 0.785, 3: 1.0, 7: 0.5}[category]  # of the box that the object covers
    bbox, area = [left, top, width, height], share * width * height
    return {"category_id": category, "bbox": bbox, "area": area, "iscrowd": crowd}
