"""From a name to a stored trial: `models:/name@alias`, `models:/name/3`, `runs:/ID`, a run id, a folder or a .zip."""

from __future__ import annotations

import os
import re
import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from qflow.bundle.bounded import read_json
from qflow.bundle.files import DIGEST, LIMITS, OF_STUDY, RECORD, check_names, files_digest, regular_files
from qflow.bundle.stored import StoredTrial, read_stored
from qflow.core.errors import BundleError
from qflow.core.temporary import TemporaryFolder
from qflow.core.text_file import require_file
from qflow.tracking.artifacts import Store
from qflow.tracking.mlflow_tracker import RESULT
from qflow.tracking.patience import Patience

BUNDLE = "data/bundle"
"""Folder of a registered model version, as MLflow lays it out, that holds the trial."""
BUNDLE_TAG = "qflow.bundle"
"""Tag of a model version: the digest over the files of its trial."""
_VERSION = re.compile(r"models:/(?P<name>[^/@:]+)(?:/(?P<version>\d+)|@(?P<alias>[\w-]+))")
_RUN = re.compile(r"(?:runs:/)?(?P<run>[0-9a-f]{32})")


def fetch(
    source: str | Path, *, uri: str | None = None, root: Path | None = None, patience: Patience | None = None
) -> StoredTrial:
    """Fetch, verify and read a stored trial; runs and versions come from the store at `uri`, or in the folder `root`.

    Raises BundleError for files that are not as qflow wrote them, TrackingError for a store, run or version that is
    missing.
    """
    text = str(source)
    if found := _VERSION.fullmatch(text):
        return _of_version(Store.open(uri, root or _root(), patience), text, **found.groupdict(default=""))
    if found := _RUN.fullmatch(text):
        return of_run(Store.open(uri, root or _root(), patience), found["run"])
    path = Path(source)
    if path.is_dir():
        return of_folder(path, text)
    if path.suffix == ".zip" and path.is_file():
        return _of_archive(path, text)
    raise BundleError(
        f"A trial is models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID, a run id, a folder or a .zip, but got "
        f"{text:.100}. Name one that exists."
    )


def of_run(store: Store, run_id: str) -> StoredTrial:
    """Return the trial of a run, with the input example and the measured report of its study."""
    source = f"run {run_id}"
    tags, _, address = store.run(run_id)
    expected = _require_trial(tags, source)
    sizes = store.sizes(address)
    check_names(sizes, source)
    keeper, folder = _temporary()
    store.download(address, sizes, folder)
    if study := tags.get("mlflow.parentRunId"):
        _, _, of_study = store.run(study)
        shared = {name: size for name, size in store.sizes(of_study).items() if name in OF_STUDY}
        check_names(shared, f"the study's run {study}", {})
        store.download(of_study, shared, folder)
    return read_stored(folder, source, run_id, tags, expected, keeper)


def of_folder(folder: Path, source: str, expected: str = "", keeper: Any = None) -> StoredTrial:
    """Return the trial of a folder with bundle.json: an unpacked archive, or a model version on disk.

    `expected` is the digest over the files if another place states it. A folder that `keeper` does not hold is copied.
    """
    inner = folder / BUNDLE
    if (inner / RECORD).is_file():
        folder = inner
    if not (folder / RECORD).is_file():
        check_names({}, source, {RECORD: 0})
    check_names(regular_files(folder, source), source, {RECORD: 0})
    if keeper is None:
        keeper, folder = _copied(folder, source)
    record = read_json(folder, RECORD)
    if not isinstance(record, dict) or record.get("schema") != 1 or not _of_texts(record.get("tags")):
        raise BundleError(f"{RECORD} of {source} has schema 1 and tags, but got others. Take another source.")
    tags, run_id = record["tags"], str(record.get("run_id", ""))
    stated = files_digest(record["files"]) if _of_texts(record.get("files")) else ""
    if expected and stated != expected:
        raise BundleError(f"Files of {source} are those that were registered, but got others. Take another version.")
    if RESULT not in tags:
        raise BundleError(f"{RECORD} of {source} holds the result of a trial, but got none. Take another source.")
    return read_stored(folder, source, run_id, tags, stated, keeper)


def _copied(folder: Path, source: str) -> tuple[Any, Path]:
    """Copy a folder of somebody else's, because its files may change between their check and their use."""
    keeper, private = _temporary()
    try:
        shutil.copytree(folder, private, symlinks=True, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        text = " ".join(str(error).split())[:120]
        raise BundleError(f"Files of {source} can be read, but got: {text}. Take another source.") from error
    check_names(regular_files(private, source), source, {RECORD: 0})
    return keeper, private


def _of_version(store: Store, source: str, name: str, version: str, alias: str) -> StoredTrial:
    number, tags, address = store.version(name, version, alias)
    if BUNDLE_TAG not in tags:
        raise BundleError(
            f"A model version that is loaded was registered by this qflow, but got {name} version {number} without the "
            f"tag {BUNDLE_TAG}. Promote its run again."
        )
    sizes = {k.removeprefix(f"{BUNDLE}/"): n for k, n in store.sizes(address, BUNDLE).items()}
    check_names(sizes, source, {RECORD: 0})
    keeper, folder = _temporary()
    store.download(address, [f"{BUNDLE}/{name}" for name in sizes], folder)
    return of_folder(folder, source, tags[BUNDLE_TAG], keeper)


def _of_archive(path: Path, source: str) -> StoredTrial:
    require_file(path, "A trial is a zip archive that qflow wrote")
    keeper, folder = _temporary()
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names):
                raise BundleError(f"Files of {source} have different names, but got two equal ones.")
            for entry in entries:
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise BundleError(f"Files of {source} are plain files, but got the link {entry.filename!r:.80}.")
            check_names({entry.filename: entry.file_size for entry in entries}, source, {RECORD: 0})
            for entry in entries:
                _unpack(archive, entry, folder, source)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        raise BundleError(f"{source} is a zip archive that qflow wrote, but got: {error}. Take another.") from error
    return of_folder(folder, source, "", keeper)


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path, source: str) -> None:
    """Write one entry; its header states a size, and no more than that is written."""
    place = folder / PurePosixPath(entry.filename)  # one of the names that qflow writes
    place.parent.mkdir(parents=True, exist_ok=True)
    left = LIMITS[entry.filename]
    with archive.open(entry) as packed, place.open("wb") as file:
        while block := packed.read(1 << 20):
            left -= len(block)
            if left < 0:
                raise BundleError(f"{entry.filename} of {source} is larger than it says. Take another source.")
            file.write(block)


def _require_trial(tags: dict[str, str], source: str) -> str:
    if RESULT not in tags:
        raise BundleError(f"A stored trial is a finished one, but got {source} without a result. Name another run.")
    if DIGEST not in tags:
        raise BundleError(
            f"A stored trial has a digest of its files (tag {DIGEST}), but got {source} of an older qflow without. "
            "Run the trial again."
        )
    return tags[DIGEST]


def _of_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items())


def _temporary() -> tuple[Any, Path]:
    keeper = TemporaryFolder()
    return keeper, Path(keeper.name)


def _root() -> Path:
    return Path(os.path.expanduser(os.environ.get("QFLOW_HOME") or "qflow_out")).resolve()
