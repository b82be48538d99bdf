"""The input example of a study as files: its tensors in safetensors, its structure in JSON, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qflow.bundle.bounded import read_json
from qflow.bundle.files import EXAMPLE
from qflow.core.errors import BundleError, DataError

SCHEMA = 1


def write_example(folder: Path, example: Any) -> None:
    """Write `example` into `folder`. Raises DataError for what is neither tensor, number, text, list nor dict."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    structure = _packed(example, tensors)
    (folder / EXAMPLE[0]).write_text(json.dumps({"schema": SCHEMA, "inputs": structure}))
    save_file(tensors, folder / EXAMPLE[1])


def read_example(folder: Path) -> Any:
    """Return the example that `write_example` wrote. Raises BundleError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stored = read_json(folder, EXAMPLE[0])
    if not isinstance(stored, dict) or stored.get("schema") != SCHEMA:
        raise BundleError(f"{EXAMPLE[0]} has schema {SCHEMA}, but got another one. Take another source.")
    try:
        return _unpacked(stored["inputs"], load_file(folder / EXAMPLE[1]))
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, OSError) as error:
        text = " ".join(str(error).split())[:80]
        raise BundleError(f"An input example is one that qflow wrote, but got {text}. Take another source.") from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(item, tensors) for item in value]}
    if isinstance(value, Mapping) and type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _packed(item, tensors) for key, item in value.items()}}
    if value is None or type(value) in (bool, int, float, str):
        return {"value": value}
    raise DataError(
        f"An input example that is stored holds tensors, numbers, texts, lists and dicts, but got "
        f"{type(value).__name__}. Give the model such inputs (data.model_inputs)."
    )


def _unpacked(stored: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, held),) = stored.items()
    if kind == "tensor":
        return tensors[held]
    if kind in ("list", "tuple"):
        items = [_unpacked(item, tensors) for item in held]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {str(key): _unpacked(item, tensors) for key, item in held.items()}
    if kind == "value" and (held is None or isinstance(held, (bool, int, float, str))):
        return held
    raise ValueError(f"an unknown part {kind!r:.20}")
