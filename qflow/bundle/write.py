"""A trial as a folder of its own: its files, the input example, all float weights, and bundle.json."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qflow.bundle.files import OF_STUDY, RECORD, WEIGHTS, check_names, digests, files_digest, regular_files
from qflow.bundle.stored import StoredTrial, record_of


def write_bundle(folder: Path, trial: StoredTrial, files: Path, weights: Mapping[str, Tensor]) -> str:
    """Write a self-contained bundle into the new folder `folder`, and return the digest over its files.

    `files` is a folder with the files of the trial, those that were stored or those of a rebuild. `weights` are the
    tensors of the float model by name; a trained trial has its own among the files.
    """
    from safetensors.torch import save_file

    shutil.copytree(files, folder, ignore=shutil.ignore_patterns(RECORD))
    for name in OF_STUDY:
        if (trial.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(trial.folder / name, folder / name)
    if not (folder / WEIGHTS).exists():
        save_file(dict(weights), folder / WEIGHTS)
    found = digests(folder)
    (folder / RECORD).write_text(record_of(replace(trial, files=found)))
    check_names(regular_files(folder, str(folder)), str(folder))
    return files_digest(found)
