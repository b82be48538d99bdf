"""The files of a trial: their names, their largest sizes, and the digest over all of them.

The digest is written as a tag when the trial is committed. Files are read only after they have been compared with it.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from qflow.core.errors import BundleError
from qflow.core.record import sha256
from qflow.report.files import CALLS, REPAIR, SCORES

MB = 1 << 20
DIGEST = "qflow.files"
"""Tag of a trial's run: the digest over its files."""
RECORD = "bundle.json"
"""File of a folder or archive: digests of its other files, and what the run held in tags."""
WEIGHTS = "qconfig/weights.safetensors"
EXAMPLE = ("example.json", "example.safetensors")
"""Files of the study's run, the same for all its trials."""
PROFILE = "profile.report"
"""File of the study's run: a copy of the measured report."""

REQUIRED: Mapping[str, int] = {
    "config.yaml": MB,
    "manifest.json": MB,
    "qconfig.txt": 32 * MB,
    "qconfig/qconfig.json": 32 * MB,
    "qconfig/requested.json": 32 * MB,
    "qconfig/scales.json": 256 * MB,
    "qconfig/quantizers.json": 64 * MB,
    "model_check_result.txt": 64 * MB,
    "model_check.json": 64 * MB,
    "cost.json": 32 * MB,
}
"""Name of each file of a trial -> its largest size in bytes."""
OPTIONAL: Mapping[str, int] = {
    WEIGHTS: 64 << 30,
    "training.json": 64 * MB,
    "training_steps.json": 64 * MB,
    "sensitivity.json": 64 * MB,
    "sensitivity_record.json": 64 * MB,
    SCORES: 64 * MB,
    REPAIR: 64 * MB,
    CALLS: 64 * MB,
}
"""Files that a trial has if it was trained, repaired, evaluated after the ranking, or scored sample by sample."""
OF_STUDY: Mapping[str, int] = {EXAMPLE[0]: MB, EXAMPLE[1]: 16 << 30, PROFILE: 64 * MB}
LIMITS: Mapping[str, int] = {**REQUIRED, **OPTIONAL, **OF_STUDY, RECORD: MB}
MOST = 256 * MB
"""Largest size in bytes of a file whose name has no limit of its own, as the pictures of an analysis."""


def check_names(sizes: Mapping[str, int], whose: str, required: Mapping[str, int] = REQUIRED) -> None:
    """Raise BundleError unless `sizes` (bytes by name) are the files of a trial: none missing, none more, none huge."""
    odd = sorted(name for name in sizes if name not in LIMITS or str(PurePosixPath(name)) != name)
    if odd:
        raise BundleError(f"Files of {whose} are those that qflow writes, but got {odd[0]!r:.80}. Take another source.")
    if missing := sorted(set(required) - set(sizes)):
        raise BundleError(f"Files of {whose} are complete, but got none called {missing[0]}. Take another source.")
    for name, size in sizes.items():
        if size > LIMITS[name]:
            raise BundleError(
                f"{name} of {whose} has at most {LIMITS[name]} bytes, but got {size}. Take another source."
            )


def regular_files(folder: Path, whose: str) -> dict[str, int]:
    """Return the sizes of all files below `folder` by name. Raises BundleError for a link, pipe or device."""
    found = {}
    for count, path in enumerate(folder.rglob("*"), 1):
        name, state = path.relative_to(folder).as_posix(), path.lstat()
        if stat.S_ISREG(state.st_mode):
            found[name] = state.st_size
        elif not stat.S_ISDIR(state.st_mode):
            raise BundleError(f"Files of {whose} are plain files, but got a link or device: {name}. Take another one.")
        if count > 1000:  # before the rest is walked, which may be a whole disk
            raise BundleError(f"{whose} has at most 1000 files, but got more. Take another source.")
    return dict(sorted(found.items()))


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder` by name, those of bundle.json and the study's files excepted."""
    names = (p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file())
    return {name: sha256(folder / name) for name in names if name not in OF_STUDY and name != RECORD}


def files_digest(found: Mapping[str, str]) -> str:
    """Return the digest over names and contents of the files, from what `digests` returned."""
    sha = hashlib.sha256()
    for name, value in sorted(found.items()):
        sha.update(f"{name}\n{value}\n".encode())
    return sha.hexdigest()
