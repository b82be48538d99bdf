"""Which samples of a source calibrate and which evaluate, and what class folders are among a model's outputs.

A source with folders of the usual names (train and val, calibration and evaluation) is split by them. Any other is
split by a digest of each sample's name, so that the order of the file system and added files change little.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qflow.core.errors import DataError
from qflow.core.text_file import read_text
from qflow.tasks.files.sources import Source

CALIBRATION = ("calibration", "calib", "train", "training")
EVALUATION = ("evaluation", "val", "valid", "validation", "test")


@dataclass(frozen=True)
class Chosen:
    """The names of the samples in each split, sorted, below a folder of their own (`train/`) or not."""

    calibration: tuple[str, ...]
    evaluation: tuple[str, ...]
    said: str
    """How they were chosen, in words."""
    depth: int = 0
    """Folders above those of classes: 1 for splits with folders of their own."""


def choose(names: Sequence[str], calibration_size: int, evaluation_size: int | None, root: str) -> Chosen:
    """Split the samples `names`, which are sorted; the two splits share none. Raises DataError for too few."""
    for key, size in (("calibration_size", calibration_size), ("evaluation_size", evaluation_size)):
        if size is not None and size < 1:
            raise DataError(f"task.data.{key} is a number above 0, but got {size}. Leave it out for the default.")
    tops = {name.partition("/")[0] for name in names if "/" in name}
    one, two = (next((t for t in known if t in tops), "") for known in (CALIBRATION, EVALUATION))
    if one and two:
        of = [[name for name in names if name.startswith(f"{top}/")] for top in (one, two)]
        calibration, evaluation = _first(of[0], calibration_size), _first(of[1], evaluation_size)
        counts = [f"{len(kept)} of {len(all_)}" for kept, all_ in zip((calibration, evaluation), of, strict=True)]
        return Chosen(
            calibration, evaluation, f"{counts[0]} in {one}/ calibrate, {counts[1]} in {two}/ evaluate", depth=1
        )
    if len(names) < 2:
        raise DataError(f"A data set has samples to calibrate and others to evaluate, but got {len(names)} in {root}.")
    calibration = _first(names, min(calibration_size, len(names) // 2))
    held = set(calibration)
    evaluation = _first([name for name in names if name not in held], evaluation_size)
    said = f"{len(calibration)} of {len(names)} calibrate, {len(evaluation)} others evaluate"
    return Chosen(calibration, evaluation, f"{said} (split by a digest of their names)")


def _first(names: Sequence[str], count: int | None) -> tuple[str, ...]:
    """`count` of the names, chosen by their digests, sorted by name; all of them for None."""
    if count is None or count >= len(names):
        return tuple(names)
    return tuple(sorted(sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:count]))


def class_of(name: str, depth: int) -> str:
    """The class folder of an image, which lies `depth` folders down; "" for an image without one."""
    folders = name.split("/")[depth:-1]
    return folders[0] if folders else ""


def classes_of(source: Source, names: Iterable[str], depth: int, root: str) -> list[str]:
    """The class folders of images in the order of their numbers; [] for images without classes.

    Raises DataError for images both in class folders and beside them.
    """
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(class_of(name, depth), name)
    if "" in found and len(found) > 1:
        other = next(name for label, name in found.items() if label)
        raise DataError(
            f"Images lie in class folders or in one folder, but got both {found['']} and {other} in {root}. Move some."
        )
    if len(found) < 2:  # a single folder says nothing of classes
        return []
    return list(source.classes) or sorted(found)


def lines_of(file: str) -> list[str]:
    """The lines of task.data.classes. Raises ConfigError for what is no text file."""
    return [line.strip() for line in read_text(Path(file), "task.data.classes is a text file").splitlines()]


def numbered(
    folders: Sequence[str], outputs: int | None, known: Sequence[Sequence[str]], file: str | None
) -> tuple[Mapping[str, int], str]:
    """Class folder -> output of the model, and how it was found; ({}, why) if the folders cannot be the outputs.

    `outputs` is the number of the model's classes, `known` the names of each, `file` a text file with the folder of
    each output, one a line. Raises DataError for a file that lacks a folder.
    """
    if file is not None:
        place = {name: i for i, name in enumerate(lines_of(file)) if name}
        if lacking := [name for name in folders if name not in place]:
            raise DataError(
                f"task.data.classes names every class folder, one a line, but got {file} without {lacking[0]}. Add it."
            )
        return {name: place[name] for name in folders}, f"class folders are outputs by {Path(file).name}"
    place = {name: i for i, names in enumerate(known) for name in names}
    if known and all(name in place for name in folders):
        return {name: place[name] for name in folders}, "class folders are outputs by their names"
    if outputs is None or len(folders) == outputs:
        return {name: i for i, name in enumerate(folders)}, f"{len(folders)} class folders are the outputs, by order"
    return {}, (
        f"{len(folders)} class folders cannot be the {outputs} outputs of the model by order, and {folders[0]} is no "
        "name of one; task.data.classes=<file> names the folder of each output, one a line"
    )
