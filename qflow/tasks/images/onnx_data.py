"""Data for an ONNX file (`task=onnx`): .npz or .npy files by the names of its inputs, or images for its one input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qflow.core.errors import ConfigError, ModelError
from qflow.tasks.files.needs import needs
from qflow.tasks.files.onnx_names import arguments_of
from qflow.tasks.files.sources import source_of
from qflow.tasks.images import arrays, samples
from qflow.tasks.images.arrays import ArrayFiles, Input
from qflow.tasks.images.own_models import MEAN, STD, scaled
from qflow.tasks.images.samples import Fit, ImageFiles


def build_data(
    *,
    root: str | None = None,
    path: str | None = None,
    size: Sequence[int] | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    classes: str | None = None,
    **settings: Any,
) -> ArrayFiles | ImageFiles:
    """What lies in `root`, for the ONNX file `path`: arrays if there are any, else images at the size of its input.

    `size`, `mean`, `std` and `classes` are of images. Raises ConfigError, DataError or ModelError in one line.
    """
    inputs, outputs = interface(path)
    ranks = [len(shape) for shape in outputs]
    by = {2: "top1", 4: "pixels"}.get(ranks[0], "cosine") if len(ranks) == 1 else "cosine"
    source = source_of(root)
    names = [name for name in source.names if name.lower().endswith(arrays.ENDINGS)]
    if names:
        kept = {key: settings[key] for key in ("calibration_size", "evaluation_size", "workers") if key in settings}
        return ArrayFiles(source=source, names=names, root=str(root), inputs=lambda _: inputs, by=by, **kept)
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 3 or shape[0] != 3:
        raise ConfigError(
            f"Images are for one input [batch, 3, height, width], but got {_shown(inputs)} in {path}. Give .npz files "
            f"with these names; task.data.root has none ({' '.join((*arrays.ENDINGS, *samples.ENDINGS))} are read)."
        )
    sizes = [int(n) for n in shape[1:] if n is not None]
    transform = scaled(size or (sizes if len(sizes) == 2 else None), mean, std)
    count = outputs[0][1] if ranks[0] == 2 else None

    def fit(model: nn.Module) -> Fit:
        return Fit(transform, count, dense=by == "pixels", by=by)

    return ImageFiles(root=root, fit=fit, classes=classes, **settings)


def interface(path: str | Path | None) -> tuple[list[Input], list[tuple[int | None, ...]]]:
    """The inputs of an ONNX file, and the shapes of its outputs with their batch. Raises ConfigError or ModelError."""
    with needs("onnx"):
        import onnx
    if path is None:
        raise ConfigError("task.model.path is an ONNX file, but got none. Set task.model.path=model.onnx.")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # no file, or no protobuf, whose errors have no common type
        raise ModelError(f"task.model.path is an ONNX file, but got {path}: {' '.join(str(error).split())}.") from error
    arguments, inputs = arguments_of(graph), []
    for value in graph.input:
        if value.name in arguments:
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
            inputs.append(Input(value.name, arguments[value.name], dtype, _sizes(value)[1:]))
    return inputs, [_sizes(value) for value in graph.output]


def _sizes(value: Any) -> tuple[int | None, ...]:
    return tuple(d.dim_value or None for d in value.type.tensor_type.shape.dim)


def _shown(inputs: Sequence[Input]) -> str:
    return ", ".join(f"{one.name} [batch, {', '.join(str(n or 'any') for n in one.shape)}]" for one in inputs)
