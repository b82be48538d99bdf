"""The loader of a registered model for MLflow: `mlflow.pyfunc.load_model("models:/perception@champion")`.

MLflow imports this module and calls `_load_pyfunc`. Inputs and outputs are arrays, by the names in the signature. Code
of the user's own model is imported only if its package is in the environment variable QFLOW_ALLOW (my_pkg,other).
MLflow calls this loader because the version names it, and would call any other: `qflow.load` is for a registry that
others may write to. `model_config` chooses the device, and what `predict` returns: `arrays`, or for
`mlflow.models.evaluate`, which takes a value a row, `class` (index of the largest value) or `rows` (one array a row).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qflow.api.load import prepared_of
from qflow.api.prepared import Prepared
from qflow.bundle.source import of_folder
from qflow.core.errors import ConfigError, DataError
from qflow.quant.trace.calling import argument_names, batch_size, call_model, cut, map_named, named_tensors

ALLOW = "QFLOW_ALLOW"
CONFIG = {"device": "cpu", "predict": "arrays"}
"""What `model_config` may set, with the defaults that are stored with the model."""
PREDICT = ("arrays", "class", "rows")
OUTPUT = "output"
"""Name of the only output of a model whose outputs have no names."""


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> Quantized:
    """Return the model in the folder `path`, which MLflow has fetched. ConfigError: wrong `model_config`."""
    settings = {**CONFIG, **(model_config or {})}
    if settings["predict"] not in PREDICT:
        raise ConfigError(f"model_config predict is one of {', '.join(PREDICT)}, but got {settings['predict']!r}.")
    allow = [name.strip() for name in os.environ.get(ALLOW, "").split(",") if name.strip()]
    trial = of_folder(Path(path), f"the model in {path}")
    return Quantized(prepared_of(trial, allow=allow, device=str(settings["device"])), settings["predict"])


class Quantized:
    """A prepared model that takes and gives arrays.

    The rows of a model with temporal state are the frames of one sequence, which each call begins anew.
    """

    def __init__(self, prepared: Prepared, returns: str = "arrays") -> None:
        self.prepared, self.returns = prepared, returns

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Return the outputs for `data`: a dict of arrays by input name, a table with such columns, or one array.

        One output is an array, several are a dict. Raises DataError for inputs of other names.
        """
        found = self._outputs(data)
        if self.returns == "arrays":
            return found
        if isinstance(found, dict):
            raise DataError(f"predict: {self.returns} is for one output, but got {', '.join(found)}. Leave it out.")
        if self.returns == "class":
            return found.argmax(1)
        rows = np.empty(len(found), dtype=object)
        rows[:] = list(found)
        return rows

    def _outputs(self, data: Any) -> Any:
        prepared, given = self.prepared, _by_name(data, [name for name, _ in named_inputs(self.prepared)])
        device = next((p.device for p in prepared.parameters()), torch.device("cpu"))

        def tensor(name: str, like: Tensor) -> Tensor:
            value = given[name]
            array = np.stack(list(value)) if value.dtype == object else value
            found = torch.from_numpy(np.ascontiguousarray(array)).to(device=device, dtype=like.dtype)
            return found.reshape(len(found), *like.shape[1:]) if found.ndim < like.ndim else found

        inputs = with_tensors(prepared, tensor)
        with torch.no_grad():
            if prepared.cached is None:
                return arrays(call_model(prepared, inputs))
            prepared.reset_state()
            size = batch_size(inputs)
            frames = [arrays(call_model(prepared, cut(inputs, size, i, i + 1))) for i in range(size)]
            prepared.reset_state()
        if isinstance(frames[0], dict):
            return {name: np.concatenate([frame[name] for frame in frames]) for name in frames[0]}
        return np.concatenate(frames)


def with_tensors(prepared: Prepared, tensor: Callable[[str, Tensor], Any]) -> Any:
    """Return the example sample with `tensor(name, value)` in the place of each tensor."""
    sample = prepared.sample
    if isinstance(sample, Mapping):
        return {key: map_named(tensor, value, str(key)) for key, value in sample.items()}
    items = sample if isinstance(sample, (tuple, list)) else (sample,)
    names = argument_names(prepared.model, len(items))
    return tuple(map_named(tensor, value, name) for name, value in zip(names, items, strict=True))


def named_inputs(prepared: Prepared) -> list[tuple[str, Tensor]]:
    """Return the input tensors of the example sample with their names in the signature."""
    found: list[tuple[str, Tensor]] = []

    def keep(name: str, value: Tensor) -> Tensor:
        found.append((name, value))
        return value

    with_tensors(prepared, keep)
    return found


def named_outputs(prepared: Prepared) -> list[tuple[str, Tensor]]:
    """Return the output tensors for the example sample with their names in the signature."""
    with torch.no_grad():
        found = _named(call_model(prepared, prepared.sample))
    if prepared.cached is not None:
        prepared.reset_state()
    return found


def arrays(outputs: Any) -> Any:
    """Return the tensors of `outputs` as arrays: one alone, several as a dict by name."""
    found = {name: value.detach().cpu().numpy() for name, value in _named(outputs)}
    return next(iter(found.values())) if len(found) == 1 else found


def _named(outputs: Any) -> list[tuple[str, Tensor]]:
    found = named_tensors(outputs)
    return [(OUTPUT, found[0][1])] if len(found) == 1 and found[0][0] == "0" else found


def _by_name(data: Any, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    if isinstance(data, np.ndarray) and len(names) == 1:
        return {names[0]: data}
    try:
        return {name: np.asarray(data[name]) for name in names}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"Inputs are arrays by the names {', '.join(names)}, but got {type(data).__name__}.") from error
