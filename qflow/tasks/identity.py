"""Fingerprints of tasks and trainings: what a study's numbers depend on beside its configuration.

Every sample counts, one by one, as model and metric get it: `collate` of the sample alone, and `model_inputs` of that.
This costs one reading of calibration and evaluation data a start (of the train split once a trial is trained), without
any forward pass: less than a hundredth of a study, which reads the same data for every trial. A smaller sample of
them would miss what changes between them.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from qflow.core.record import DIGEST_CHARS
from qflow.tasks.content_digest import ContentDigest, bytes_of
from qflow.tasks.sources import loaded_sources, own_sources
from qflow.tasks.task import Task, loaded, model_inputs, seeded

SPLITS = ("calibration", "evaluation")


@dataclass(frozen=True)
class Identity:
    """What contents depend on, and the parts of it that nothing can identify: with one, nothing may be kept."""

    content: dict[str, Any]
    unidentified: tuple[str, ...] = ()


def of_task(task: Task, skip: Sequence[str] = ()) -> Identity:
    """What everything that is computed on a task depends on: weights, data, all code, versions and threads."""
    anatomy = ContentDigest()
    if hasattr(task.metric, "reset"):
        task.metric.reset()  # what it has summed up is none of its settings
    anatomy.add(task.model, "task.model")
    anatomy.add(task.metric, "task.metric")
    beside = _beside_samples(task)
    data = {split: split_digest(task, split, anatomy.unidentified) for split in SPLITS}
    content = {
        "weights": weights_digest(task.model),
        "data": data,
        "parts": [anatomy.digest, beside.digest],
        "code": [own_sources(), loaded_sources(anatomy.packages | beside.packages)],  # after all has been used
        "skip": list(skip),
        "versions": [platform.python_version(), torch.__version__, np.__version__],
        "machine": [task.device, _machine(task.device), torch.get_num_threads()],
    }
    return Identity(content, tuple(anatomy.unidentified))


def of_training(task: Task, parts: Any, split: str = "train") -> Identity:
    """What a training depends on beside its task and settings: loss, optimizer and scheduler, and all its data."""
    anatomy = ContentDigest()
    anatomy.add(parts, "qat")
    train = split_digest(task, split, anatomy.unidentified)
    content = {"parts": anatomy.digest, "code": loaded_sources(anatomy.packages), "train": train}
    return Identity(content, tuple(anatomy.unidentified))


def _beside_samples(task: Task) -> ContentDigest:
    """The data object without its splits: how it collates a batch of several may hang on its attributes.

    What of it cannot be identified (a file that is open) speaks through the samples, which are all hashed.
    """
    anatomy, splits = ContentDigest(), {*SPLITS, "train", "train_augmented", "calibration_augmented"}
    owner = task.data if isinstance(task.data, type) else type(task.data)
    attributes = getattr(task.data, "__dict__", {})
    anatomy.add({name: value for name, value in attributes.items() if name not in splits}, "task.data")
    if not isinstance(task.data, type):
        anatomy.add(owner, "task.data")
    return anatomy


def split_digest(task: Task, split: str, unidentified: list[str]) -> str:
    """Fingerprint of every sample of a split; what of them cannot be identified is added to `unidentified`.

    Random numbers start at one place, so that a split that is augmented has the same fingerprint each time.
    """
    anatomy, data = ContentDigest(), getattr(task.data, split, None)
    if data is None or not len(data):  # whoever needs it says so
        return "0"
    loader = DataLoader(data, batch_size=1, collate_fn=getattr(task.data, "collate", None))
    with seeded():
        for batch in loaded(loader, split):
            anatomy.add([batch, model_inputs(task, batch)], f"task.data.{split}")
            anatomy.forget()
    unidentified += anatomy.unidentified[:1]
    return f"{len(data)}:{anatomy.digest}"


def weights_digest(model: torch.nn.Module) -> str:
    """Fingerprint of all parameters and buffers, names included."""
    sha = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        sha.update(name.encode())
        sha.update(bytes_of(tensor))
    return sha.hexdigest()[:DIGEST_CHARS]


def _machine(device: str) -> str:
    """The kernels that torch chooses: another processor sums in another order."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
