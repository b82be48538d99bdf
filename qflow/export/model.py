"""`qflow.export_model`: write a calibrated model to the files of one target."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from qflow.analysis.measures.tables import SensitivityTable
from qflow.api.prepared import Prepared
from qflow.config.device_file import load_rules
from qflow.core.errors import ConfigError, ModelError
from qflow.core.record import plain, to_json
from qflow.core.temporary import TemporaryFolder
from qflow.core.version import VERSION
from qflow.export.contract import Exported, ExportError, Subject, written
from qflow.export.targets import TARGETS

RECORD = "export.json"
SCHEMA = 1


def export_model(
    prepared: Prepared,
    target: str,
    folder: str | Path,
    *,
    sensitivity: SensitivityTable | None = None,
    origin: Mapping[str, str] | None = None,
) -> Exported:
    """Write `prepared` to `folder` as `target` takes it, with `export.json`; return files, fallbacks, what is missing.

    `folder` is new or empty, or holds an earlier export, which is replaced once the new one is complete. `sensitivity`
    is the table of an analysis; targets that have no use for it leave it out. `origin` tells in the README where the
    model comes from. Raises ConfigError for an unknown target, ExportError for another folder or a missing extra,
    ModelError for an uncalibrated model.
    """
    if target not in TARGETS:
        raise ConfigError(f"A target is one of {', '.join(TARGETS)}, but got {target!r}.")
    if prepared.uncalibrated:
        raise ModelError(
            f"An export needs scales, but got an uncalibrated model ({prepared.uncalibrated[0]} first). Call "
            "qflow.calibrate first."
        )
    folder = Path(folder)
    _require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryFolder(folder.parent) as name:
        made = Path(name) / "files"
        made.mkdir()
        exported = TARGETS[target](Subject(prepared, sensitivity, dict(origin or {})), made)
        (made / RECORD).write_text(_record(exported, prepared, made) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return Exported(exported.target, written(folder), exported.fallbacks, exported.unexpressed, exported.notes)


def _require_free(folder: Path) -> None:
    """Raise ExportError for a folder with other files than an export's."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).is_file():
        raise ExportError(
            f"An export is written to a new folder or over an earlier export, but got {folder} with other files. "
            f"Give another: out={folder.name}-export."
        )
    if folder.exists() and not folder.is_dir():
        raise ExportError(f"An export is written to a folder, but got the file {folder}. Give another: out=exported.")


def _record(exported: Exported, prepared: Prepared, folder: Path) -> str:
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in exported.files}
    content = {
        "schema": SCHEMA,
        "qflow": VERSION,
        "march": load_rules(prepared.march).march,
        "qconfig": prepared.applied.digest,
        **plain({name: getattr(exported, name) for name in ("target", "fallbacks", "unexpressed", "notes")}),
        "files": files,
    }
    return to_json(content, indent=2)
