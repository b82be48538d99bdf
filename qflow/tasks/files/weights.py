"""Float weights from a file of the user's: safetensors, or a checkpoint of torch that holds tensors alone."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from qflow.core.errors import ModelError

INSIDE = ("state_dict", "model_state_dict", "model", "state_dict_ema")
"""Where training scripts keep the weights in a checkpoint."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Give `model` the weights in `path`. Raises ModelError for a file that cannot be read or has other names."""
    found = {name.removeprefix("module."): tensor for name, tensor in _tensors(Path(path)).items()}
    own = model.state_dict()
    missing, further = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    shapes = [name for name in own if name in found and own[name].shape != found[name].shape]
    for words, names in (("lack", missing), ("also hold", further), ("have another shape of", shapes)):
        if names:
            raise ModelError(
                f"task.model.weights are those of the model, but got {path}, which {words} {names[0]} "
                f"({len(names)} such names). Take the file of this model, or check its arguments in task.model."
            )
    model.load_state_dict(found)


def _tensors(path: Path) -> Mapping[str, Tensor]:
    rule = "task.model.weights is a .safetensors file, or a .pth file of tensors alone"
    if not path.is_file():
        raise ModelError(f"{rule}, but got {path}, which is no file. Check the path.")
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())[:120]
        raise ModelError(f"{rule}, but got {path}: {why}. Save it with torch.save(model.state_dict(), ...).") from error
    for key in INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not (isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())):
        raise ModelError(f"{rule}, but got {path} with other values. Save it with torch.save(model.state_dict(), ...).")
    return found
