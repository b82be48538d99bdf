"""Fingerprints of weights and data: what a study's numbers depend on beside its configuration."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

import qflow
from qflow.core.record import DIGEST_CHARS
from qflow.tasks.task import Task, batches

SPLITS = ("calibration", "evaluation")


def content(task: Task, skip: Sequence[str] = ()) -> dict[str, Any]:
    """What everything that is computed on a task depends on: weights, data, the code of model, metric and qflow,
    versions and threads.
    """
    return {
        "weights": weights_digest(task.model),
        "data": data_digest(task, [*SPLITS, *(["train"] if getattr(task.data, "train", None) is not None else [])]),
        "model": _code(task.model),
        "metric": [_code(task.metric), repr(task.metric) if " at 0x" not in repr(task.metric) else ""],
        "skip": list(skip),
        "qflow": _package_code(),
        "versions": [torch.__version__, torch.get_num_threads(), task.device],
    }


def _package_code() -> str:
    """Fingerprint of qflow's own source: a changed engine finds nothing of the old one's."""
    sha = hashlib.sha256()
    for path in sorted(Path(qflow.__file__).parent.rglob("*.py")):
        sha.update(path.read_bytes())
    return sha.hexdigest()[:DIGEST_CHARS]


def _code(thing: object) -> str:
    """Fingerprint of the module that a class or function is written in; its name where there is no source."""
    owner = thing if inspect.isroutine(thing) else type(thing)
    try:
        text = inspect.getsource(inspect.getmodule(owner) or owner)  # type: ignore[arg-type]
    except (OSError, TypeError):
        text = repr(owner)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARS]


def data_digest(task: Task, splits: Sequence[str] = SPLITS) -> str:
    """Fingerprint of the data: sizes of the splits and 32 samples of each, evenly spaced."""
    sha = hashlib.sha256()
    for split in splits:
        size = len(getattr(task.data, split))
        sha.update(f"{split}:{size}".encode())
        for batch, _ in batches(task, split, 8, indices=range(0, size, max(size // 32, 1))):
            for tensor in tree_flatten(batch)[0]:
                if isinstance(tensor, Tensor):
                    sha.update(_bytes(tensor))
    return sha.hexdigest()[:DIGEST_CHARS]


def weights_digest(model: torch.nn.Module) -> str:
    """Fingerprint of all parameters and buffers, names included."""
    sha = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        sha.update(name.encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()[:DIGEST_CHARS]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
