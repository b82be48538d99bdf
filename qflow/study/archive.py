"""A study as one file, from one store to another: its runs with all values and files, and its Optuna study as data.

The file is a .zip with `study.json` and the files of the runs under `files/<number of the run>/`. `study.json` holds
the SHA-256 of every file and a digest over itself. An import checks all of it before anything is written, runs no code,
and makes the study known as its last step.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from qflow.bundle.files import LIMITS, MOST, OPTIONAL, REQUIRED
from qflow.core.errors import BundleError, TrackingError, TrialError
from qflow.core.names import check_study_name
from qflow.core.record import digest, sha256
from qflow.core.temporary import TemporaryFolder
from qflow.core.text_file import require_file
from qflow.core.version import VERSION
from qflow.search.carried import check_study, restore_study, study_names, study_record, taken, withdraw_study
from qflow.search.outcome import Marker
from qflow.search.spool import spool_of, waiting
from qflow.study.find import one_study
from qflow.tracking.artifacts import Store
from qflow.tracking.carried import (
    publish,
    renamed,
    restore_runs,
    run_records,
    unfinished,
    withdraw_runs,
    withdrawn_on_error,
)
from qflow.tracking.limits import check_experiment_name, joined
from qflow.tracking.mlflow_tracker import RESULT, MlflowTracker
from qflow.tracking.patience import Patience
from qflow.tracking.run_records import check_runs, trial_number

FORMAT, SCHEMA = "qflow study", 1
RECORD = "study.json"
LARGEST_RECORD = 1 << 28  # bytes; a study of 500 trials has 20 MB
TEXTS = (".json", ".md", ".txt", ".html", ".csv")
"""Files of the study's own run in which the ids of its trials are renamed."""
KINDS = (*TEXTS, ".yaml", ".png", ".pt", ".safetensors", ".report")
"""Files of the study's own run, as qflow and its stages write them."""


def pack(
    uri: str | None,
    root: Path,
    study: str,
    path: Path,
    experiment: str | None = None,
    patience: Patience | None = None,
    searches: str | Path | None = None,
) -> int:
    """Write the study to the file `path` and return the number of its trials; `experiment` None looks in all.

    `searches` is the Optuna storage, by default that of `root`.

    Raises TrackingError for an unknown study, for several of this name, or one with a running trial; BundleError for a
    file that exists, or results that the store does not hold yet.
    """
    if os.path.lexists(path):  # a link that leads nowhere is somebody's too
        raise BundleError(f"A bundle is a new file, but got {path}, which exists. Name another.")
    store = Store.open(uri, root, patience)
    experiment, run = one_study(store, study, experiment, "A bundled study is in the store")
    if kept := waiting(spool_of(root, study)):
        raise BundleError(
            f"A bundle holds all results of a study, but got {len(kept)} that wait in {kept[0].parent} to be delivered "
            "to the store. Start its qflow.tune, which delivers them."
        )
    records = run_records(store, run)
    searched = any(int(record["tags"]["qflow.trial"]) >= 0 for record in records[1:])  # not only trials by hand
    searches = searches or root
    optuna_study = study_record(searches, study) if searched or study in study_names(searches) else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFolder(path.parent) as name:
        for number, record in enumerate(records):
            place = Path(name) / "files" / str(number)
            place.mkdir(parents=True)
            address = str(record.pop("address"))
            store.download(address, store.sizes(address), place)
            record["files"] = _digests(place, record["id"], of_study=not number)
        content = {"experiment": experiment, "study": study, "runs": records, "optuna": optuna_study}
        head = {"format": FORMAT, "schema": SCHEMA, "qflow": VERSION, "digest": digest(content)}
        (Path(name) / RECORD).write_text(json.dumps({**head, **content}, allow_nan=False))
        made = Path(name) / "made.zip"
        with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(Path(name) / RECORD, RECORD)
            for file in sorted((Path(name) / "files").rglob("*")):
                if file.is_file():
                    archive.write(file, file.relative_to(name).as_posix())
        made.rename(path)
    return len(records) - 1


def unpack(
    uri: str | None, root: Path, path: Path, patience: Patience | None = None, searches: str | Path | None = None
) -> tuple[str, int]:
    """Add the study of a bundle to the store, and its search to `searches`; return its name and number of trials.

    Raises BundleError for a file that is not as `pack` wrote it, or a study whose name the store knows.
    """
    with TemporaryFolder() as name:
        folder = Path(name)
        record = _verified(path, folder)
        study, runs = record["study"], record["runs"]
        searches = searches or root
        tracker = _free_store(uri, root, study, record["experiment"], patience, searches)
        folders = [folder / "files" / str(number) for number in range(len(runs))]
        for place in folders:
            place.mkdir(parents=True, exist_ok=True)
        made = restore_runs(tracker, runs, folders)
        with withdrawn_on_error(tracker, made):
            try:
                _rename_texts(tracker, folders[0], made[runs[0]["id"]], made)
                if record["optuna"] is not None:
                    restore_study(searches, json.loads(renamed(json.dumps(record["optuna"]), made)))
                publish(tracker, runs, made)
            except BaseException:
                withdraw_study(searches, study, made.values())
                raise
    return study, len(runs) - 1


def _free_store(
    uri: str | None, root: Path, study: str, experiment: str, patience: Patience | None, searches: str | Path
) -> MlflowTracker:
    """Open the store for a study that it does not know; what a killed import of it has left is removed.

    Raises BundleError, before anything is made, for a study that it knows.
    """
    store, left = None, []
    with suppress(TrackingError):  # a store that is missing is made below, or refused with its reason
        store = Store.open(uri, root, patience)
    if store is not None:
        if store.studies(study):
            raise BundleError(taken(study))
        left = unfinished(store, study)
        withdraw_study(searches, study, left)
    if study in study_names(searches):
        raise BundleError(taken(study))
    if store is not None:
        withdraw_runs(store, left)
    root.mkdir(parents=True, exist_ok=True)
    return MlflowTracker.open(uri, root, experiment, patience)


def _rename_texts(tracker: MlflowTracker, folder: Path, run_id: str, made: Mapping[str, str]) -> None:
    """Write the study's own texts again with the new ids of its trials."""
    for file in [p for p in folder.rglob("*") if p.suffix in TEXTS]:
        text = file.read_text(errors="surrogateescape")
        if (new := renamed(text, made)) != text:
            file.write_text(new, errors="surrogateescape")
            below = file.parent.relative_to(folder).as_posix()
            with tracker.calling() as client:
                client.log_artifact(run_id, str(file), None if below == "." else below)


def _verified(path: Path, folder: Path) -> dict[str, Any]:
    """Unpack a bundle into `folder` and return its record. Raises QflowError unless all is as `pack` wrote it."""
    require_file(path, "A study is imported from a bundle")
    try:
        with zipfile.ZipFile(path) as archive:
            record = _record(archive, path)
            listed = {
                f"files/{number}/{name}": str(value)
                for number, run in enumerate(record["runs"])
                for name, value in run["files"].items()
            }
            _check_entries(archive.infolist(), listed, path, folder)
            for name, value in listed.items():
                archive.extract(name, folder)
                if sha256(folder / name) != value:
                    raise _damaged(path, f"another content of {name:.80}")
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise BundleError(f"A study is imported from a bundle, but got {path}: {error}. Name its file.") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError, TrialError) as error:
        raise _damaged(path, " ".join(str(error).split())[:80]) from error
    return record


def _record(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    if archive.getinfo(RECORD).file_size > LARGEST_RECORD:
        raise _damaged(path, f"a {RECORD} of more than {LARGEST_RECORD} bytes")
    record = json.loads(archive.read(RECORD), parse_constant=_refuse_constant)
    if record["format"] != FORMAT or record["schema"] != SCHEMA:
        raise _damaged(path, f"format {record['format']!s:.20}, schema {record['schema']!s:.20}")
    content = {key: record[key] for key in ("experiment", "study", "runs", "optuna")}
    if digest(content) != record["digest"]:
        raise _damaged(path, "another digest than it states")
    check_study_name(record["study"])
    check_experiment_name(record["experiment"])
    check_runs(record["runs"], record["study"])
    for number, run in enumerate(record["runs"]):
        if odd := _unknown(run["files"], of_study=not number):
            raise _damaged(path, f"the file {odd[0]!a:.80}, which no run has")
        if text := joined(run["tags"]).get(RESULT):
            Marker.from_json(text)
    searched = [number for run in record["runs"][1:] if (number := trial_number(run)) >= 0]
    if (optuna := record["optuna"]) is None:
        if searched:
            raise _damaged(path, f"trial {searched[0]} of a search, and no search")
    else:
        if optuna["name"] != record["study"]:
            raise _damaged(path, "an Optuna study of another name")
        trials, _ = check_study(optuna)
        if searched and max(searched) >= len(trials):
            raise _damaged(path, f"trial {max(searched)}, which its search of {len(trials)} trials does not have")
    return content


def _digests(place: Path, run: str, of_study: bool) -> dict[str, str]:
    """Return the SHA-256 of each file of a run by name. Raises BundleError for one that an import would refuse."""
    found = {p.relative_to(place).as_posix(): sha256(p) for p in sorted(place.rglob("*")) if p.is_file()}
    if odd := _unknown(found, of_study):
        raise BundleError(
            f"A bundle holds the files that qflow writes, but got {odd[0]!r:.80} in run {run}. Delete it from the run."
        )
    return found


def _unknown(names: Iterable[str], of_study: bool) -> list[str]:
    """Return the names of files that no run of qflow has: a trial's are a fixed list, the study's have few kinds."""
    known = {*REQUIRED, *OPTIONAL}
    return [name for name in names if (not name.endswith(KINDS) if of_study else name not in known)]


def _refuse_constant(constant: str) -> None:
    raise ValueError(constant)


def _check_entries(entries: Sequence[zipfile.ZipInfo], listed: Mapping[str, str], path: Path, folder: Path) -> None:
    """Raise BundleError unless the files are those that the record lists, of sizes that are written, and fit."""
    names = [entry.filename for entry in entries]
    odd = [n for n in names if n != RECORD and (n not in listed or not _plain(n))]
    if odd or sorted(names) != sorted([RECORD, *listed]):
        raise _damaged(path, f"the file {odd[0]:.80}" if odd else "other files than it lists")
    for entry in entries:
        most = LARGEST_RECORD if entry.filename == RECORD else LIMITS.get(entry.filename.split("/", 2)[2], MOST)
        if entry.file_size > most:
            raise _damaged(path, f"{entry.file_size} bytes, more than {most}, for {entry.filename:.80}")
    total, free = sum(entry.file_size for entry in entries), shutil.disk_usage(folder).free
    if total > free:
        raise BundleError(
            f"A bundle is unpacked into {folder.parent}, but got {path} of {total} bytes, and {free} are free. Set "
            "TMPDIR to a larger folder."
        )


def _plain(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name and "\\" not in name


def _damaged(path: Path, what: str) -> BundleError:
    return BundleError(f"A bundle is as qflow wrote it, but got {what} in {path}. Bundle the study again.")
