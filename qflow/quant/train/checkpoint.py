"""Training checkpoints: one safetensors file with the tensors, and all other values as JSON in its header.

A nested state (of an optimizer or a scheduler) is flattened: every tensor gets a name, and the JSON holds that name in
its place. Nothing is unpickled, so a checkpoint from another source can do no harm. Floats survive bit for bit (JSON
holds their shortest exact form). The file is written under a temporary name and then renamed, so that a crash leaves
the previous checkpoint.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qflow.core.errors import ModelError, QflowError, TrialError
from qflow.core.store import written_aside
from qflow.quant.values.fake_quant import FakeQuant

SCHEMA = "1"


def save_checkpoint(path: Path, state: dict[str, Any], model: nn.Module) -> None:
    """Write the state of `model` and the training's `state`. Raises TrialError for a value that is not plain."""
    tensors: dict[str, Tensor] = {}
    kept = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    content = {"state": flatten(state, tensors, "training"), "dtypes": _dtypes(model)}
    tensors.update({f"model:{name}": tensor for name, tensor in kept.items()})
    # safetensors refuses tied weights, which share memory: each tensor is copied
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with written_aside(path) as aside:
        save_file(whole, aside, {"qflow": json.dumps(content), "schema": SCHEMA})


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON content of a checkpoint and its tensors. Raises TrialError if the file is not a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError) as error:
        raise TrialError(f"A checkpoint is a safetensors file, but got {path.name}: {error}. Remove it.") from error
    if header.get("schema") != SCHEMA:
        raise TrialError(f"A checkpoint has schema {SCHEMA}, but got {header.get('schema')} in {path.name}. Remove it.")
    return json.loads(header["qflow"]), tensors


def load_checkpoint(path: Path, model: nn.Module) -> dict[str, Any]:
    """Load the state of `model` from `path` and return the training's state. Raises TrialError if it does not fit."""
    content, tensors = read_checkpoint(path)
    dtypes = _dtypes(model)
    if content["dtypes"] != dtypes:
        changed = sorted(k for k in {*dtypes, *content["dtypes"]} if dtypes.get(k) != content["dtypes"].get(k))
        raise TrialError(
            f"A checkpoint resumes with its own qconfig, but got another dtype at {changed[0]}. Calibrate with that "
            "qconfig, or remove the checkpoint."
        )
    settings = {
        n: v for n, v in model.state_dict().items() if n.endswith("_extra_state")
    }  # their dtypes are those just compared
    try:
        saved = {n.removeprefix("model:"): t for n, t in tensors.items() if n.startswith("model:")}
        model.load_state_dict({**saved, **settings})
    except (RuntimeError, ModelError) as error:
        text = " ".join(str(error).split())
        raise TrialError(f"A checkpoint belongs to the same model, but got: {text}. Remove {path.name}.") from error
    state: dict[str, Any] = restore(content["state"], tensors)
    return state


def _dtypes(model: nn.Module) -> dict[str, str]:
    found = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuant)}
    return {f"{name} ({m.name})": str(m.dtype) for name, m in found.items()}


def flatten(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as plain JSON values; its tensors go into `tensors`. Tags on containers keep the types of their keys."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[flatten(k, tensors, name), flatten(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, (np.integer, np.floating)):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TrialError(
        f"A checkpoint holds tensors and plain values, but got {type(value).__name__} for {name}. "
        "Train without a checkpoint, or use another optimizer or scheduler."
    )


def restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `flatten` flattened."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {restore(k, tensors): restore(v, tensors) for k, v in content}
    items = [restore(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def random_state() -> dict[str, Any]:
    """State of every random generator that a training may use: torch (all devices), Python, NumPy."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, [int(k) for k in keys], *rest),
    }


def restore_random(state: dict[str, Any]) -> None:
    """Restore all random generators. Raises QflowError if there are fewer GPUs than before."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) > torch.cuda.device_count():
        raise QflowError(
            f"A checkpoint resumes on at least {len(state['cuda'])} GPUs, but got {torch.cuda.device_count()}."
        )
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
