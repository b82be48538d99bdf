"""Fingerprints of weights and data: what a study's numbers depend on beside its configuration."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from qflow.core.record import DIGEST_CHARS
from qflow.tasks.task import Task, batches


def data_digest(task: Task) -> str:
    """Fingerprint of the data: sizes of both splits and 32 samples of each, evenly spaced."""
    sha = hashlib.sha256()
    for split in ("calibration", "evaluation"):
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
