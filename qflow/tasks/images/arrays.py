"""Arrays as calibration and evaluation data: a folder or archive of .npz or .npy files, one sample each.

A .npz holds the model's inputs by name (one of any name for a model with one input), without the batch or with a batch
of 1, and may hold `label`, the number of the sample's class. Arrays of objects are not read.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from qflow.core.errors import DataError
from qflow.tasks.files.listing import choose
from qflow.tasks.files.readable import note, readable
from qflow.tasks.files.sources import Source
from qflow.tasks.images.samples import WITHOUT, ClassifiedImages, ImageData
from qflow.tasks.metrics.agreement import Agreement
from qflow.tasks.metrics.labels import Top1

ENDINGS = (".npz", ".npy")
LABEL = "label"


@dataclass(frozen=True)
class Input:
    """An input of a model: its name, its dtype, and its sizes without the batch, None where they are open."""

    name: str
    argument: str
    """Its name as an argument of the model's forward."""
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Arrays(Dataset[Any]):
    """Samples of one tensor, or of tensors by the names of inputs; with a class if the files have `label`."""

    def __init__(self, source: Source, names: Sequence[str], inputs: Sequence[Input], labelled: bool) -> None:
        self.source, self.names, self.inputs, self.labelled = source, names, inputs, labelled

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        found, label = loaded_arrays(self.source, self.names[index], self.inputs)
        sample = next(iter(found.values())) if len(self.inputs) == 1 else found
        return (sample, label) if self.labelled else sample


@dataclass(frozen=True, kw_only=True)
class ArrayFiles:
    """The arrays of a source before they are split."""

    source: Source
    names: Sequence[str]
    root: str
    inputs: Callable[[nn.Module], Sequence[Input]]
    by: str
    """What agreement with float compares where there are no labels (agreement.py)."""
    calibration_size: int = 256
    evaluation_size: int | None = None
    workers: int = 0

    def for_model(self, model: nn.Module) -> ImageData:
        """The data for the inputs of a model. Raises DataError for files that cannot be used."""
        inputs, labels = self.inputs(model), dict[str, bool]()
        chosen = choose(self.names, self.calibration_size, self.evaluation_size, self.root)

        def why(name: str) -> str:
            try:
                labels[name] = loaded_arrays(self.source, name, inputs)[1] is not None
            except DataError as error:
                return str(error.__cause__ or error)
            return ""

        splits = [chosen.calibration, chosen.evaluation]
        kept, notes = readable(splits, lambda name: (name,), why, root=self.root, workers=self.workers)
        labelled = all(labels[name] for split in kept for name in split)
        calibration, evaluation = (Arrays(self.source, split, inputs, labelled) for split in kept)
        made: dict[str, Any] = {"calibration": calibration, "evaluation": evaluation, "workers": self.workers}
        lines = note("data", f"{self.root}: {chosen.said}"), *notes
        if labelled:
            return ClassifiedImages(**made, notes=lines, metric=Top1())
        reason = f"the files of {self.root} have no array `{LABEL}`"
        lines = (*lines, note("labels", f"{reason}; {WITHOUT}"))
        return ImageData(**made, notes=lines, unlabelled=reason, metric=Agreement(by=self.by))


def loaded_arrays(source: Source, name: str, inputs: Sequence[Input]) -> tuple[dict[str, Tensor], int | None]:
    """The inputs of a sample by name, and its class. Raises DataError, which names the file and what is wrong."""
    try:
        held = _opened(source.read(name))
        label = held.get(LABEL) if not any(one.name == LABEL for one in inputs) else None
        values = {key: value for key, value in held.items() if label is None or key != LABEL}
        if len(inputs) == len(values) == 1:
            values = {inputs[0].name: next(iter(values.values()))}
        tensors = {one.argument: _fitted(values, one) for one in inputs}
        return tensors, None if label is None else int(np.asarray(label).reshape(()))
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"A sample is a .npz or .npy of the model's inputs, but got {name}: {error}.") from error


def _opened(content: bytes) -> Mapping[str, Any]:
    """The arrays of a file by name. Raises ValueError for anything but arrays of numbers."""
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
        return {"": found} if isinstance(found, np.ndarray) else dict(found)
    except ValueError as error:  # its text offers to unpickle the file
        raise ValueError("no arrays of numbers") from error


def _fitted(values: Mapping[str, Any], one: Input) -> Tensor:
    """An array as the input without its batch. Raises ValueError for another shape, dtype or name."""
    if one.name not in values:
        raise ValueError(f"no array {one.name}, but {', '.join(values) or 'none'}")
    value = np.asarray(values[one.name])
    wanted = " x ".join("any" if size is None else str(size) for size in one.shape) or "a number"
    inner = value[0] if value.ndim == len(one.shape) + 1 and value.shape[0] == 1 else value
    sizes = zip(inner.shape, one.shape, strict=False)
    if inner.ndim != len(one.shape) or any(size not in (None, have) for have, size in sizes):
        raise ValueError(f"{one.name} of shape {list(value.shape)} is not {wanted}")
    if value.dtype.kind not in "fiub" or (value.dtype.kind == "f") != (one.dtype.kind == "f"):
        raise ValueError(f"{one.name} of dtype {value.dtype} is not {one.dtype}")
    return torch.from_numpy(np.array(inner, dtype=one.dtype))
