"""Fingerprints of tasks and trainings: everything besides the configuration that the results of a study depend on.

Every sample is hashed as the model and the metric get it: `collate` of the sample alone, and `model_inputs` of that.
Each start therefore reads the calibration and evaluation data once (the train split as soon as a trial is trained),
without any forward pass. This takes less than a hundredth of a study, which reads the same data for every trial. If
only some samples were hashed, changes of the others would go unnoticed.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from qflow.core.record import DIGEST_CHARS
from qflow.tasks.content_digest import ContentDigest, bytes_of
from qflow.tasks.loading import loaded, seeded
from qflow.tasks.sequences import lengths_of
from qflow.tasks.sources import loaded_modules, loaded_sources, own_sources
from qflow.tasks.task import Task, model_inputs

SPLITS = ("calibration", "evaluation")
SAID = ("workers", "notes", "unlabelled")
"""Attributes of the data on which no sample depends."""


@dataclass(frozen=True)
class Identity:
    """What results depend on, and the names of parts that cannot be identified: with any, no result may be stored."""

    content: dict[str, Any]
    unidentified: tuple[str, ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the modules that the code of the content stands for, by name."""

    def differing(self, other: Identity) -> list[str]:
        """Return the parts of the content that differ, for another process that builds the same.

        One process may have loaded more modules than the other: only those that both have must be the same.
        """
        mine, theirs = self.content, other.content
        parts = [part for part in {**mine, **theirs} if part != "code" and mine.get(part) != theirs.get(part)]
        both = self.modules.keys() & other.modules.keys()
        same = mine["code"][0] == theirs["code"][0] and all(self.modules[m] == other.modules[m] for m in both)
        return parts if same else [*parts, "code"]


def of_task(
    task: Task, skip: Sequence[str] = (), fold_functional_norms: bool = False, split_shared: Sequence[str] = ()
) -> Identity:
    """What all results on a task depend on: weights, data, all code, versions and threads."""
    objects = ContentDigest()
    if hasattr(task.metric, "reset"):
        task.metric.reset()  # sums of an earlier evaluation are not part of its settings
    objects.add(task.model, "task.model")
    objects.add(task.metric, "task.metric")
    settings = _data_settings(task)
    data = {split: split_digest(task, split, objects.unidentified) for split in SPLITS}
    packages = objects.packages | settings.packages
    content = {
        "weights": weights_digest(task.model),
        "data": data,
        "parts": [objects.digest, settings.digest],
        "code": [own_sources(), loaded_sources(packages)],  # last: modules load when used
        "skip": list(skip),
        "state": list(task.cached_attrs),
        "fold_functional_norms": fold_functional_norms,
        "split_shared": list(split_shared),
        "versions": [platform.python_version(), torch.__version__, np.__version__],
        "machine": [task.device, _machine(task.device), torch.get_num_threads()],
    }
    return Identity(content, tuple(objects.unidentified), loaded_modules(packages))


def of_training(task: Task, parts: Any, split: str = "train") -> Identity:
    """What a training depends on besides its task and settings: loss, optimizer and scheduler, and all its data."""
    objects = ContentDigest()
    objects.add(parts, "qat")
    train = split_digest(task, split, objects.unidentified)
    content = {"parts": objects.digest, "code": loaded_sources(objects.packages), "train": train}
    return Identity(content, tuple(objects.unidentified))


def _data_settings(task: Task) -> ContentDigest:
    """Digest of the data object without its splits: its attributes may decide how it collates several samples.

    An attribute that cannot be identified (an open file) does not matter: its effect is in the samples, all hashed.
    """
    settings, splits = ContentDigest(), {*SPLITS, "train", "train_augmented", "calibration_augmented", *SAID}
    owner = task.data if isinstance(task.data, type) else type(task.data)
    attributes = getattr(task.data, "__dict__", {})
    settings.add({name: value for name, value in attributes.items() if name not in splits}, "task.data")
    if not isinstance(task.data, type):
        settings.add(owner, "task.data")
    return settings


def split_digest(task: Task, split: str, unidentified: list[str]) -> str:
    """Fingerprint of every sample of a split; parts that cannot be identified are added to `unidentified`.

    Random seeds are fixed, so that an augmented split has the same fingerprint each time.
    """
    samples, data = ContentDigest(), getattr(task.data, split, None)
    if data is None or not len(data):  # the step that needs the split reports this
        return "0"
    loader = DataLoader(data, batch_size=1, collate_fn=getattr(task.data, "collate", None))
    with seeded():
        for batch in loaded(loader, split):
            samples.add([batch, model_inputs(task, batch)], f"task.data.{split}")
            samples.forget()
    unidentified += samples.unidentified[:1]
    sequences = f"{list(lengths_of(data, split))}:" if task.cached_attrs and split in SPLITS else ""
    return f"{len(data)}:{sequences}{samples.digest}"


def weights_digest(model: torch.nn.Module) -> str:
    """Fingerprint of all parameters and buffers, names included."""
    sha = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        sha.update(name.encode())
        sha.update(bytes_of(tensor))
    return sha.hexdigest()[:DIGEST_CHARS]


def _machine(device: str) -> str:
    """The kind of processor: it decides which kernels torch runs, and so the order of sums."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
