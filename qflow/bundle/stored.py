"""A trial as it was stored, read as data: its files are verified first, and no code of it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qflow.analysis.measures.tables import SensitivityTable
from qflow.bundle import texts
from qflow.bundle.bounded import read_config, read_json
from qflow.bundle.files import DIGEST, EXAMPLE, PROFILE, WEIGHTS, check_names, digests, files_digest, regular_files
from qflow.config.settings import plain
from qflow.core.errors import BundleError, QflowError
from qflow.core.qconfig import QConfig
from qflow.core.record import digest, from_dict
from qflow.search.outcome import Marker
from qflow.tracking.mlflow_tracker import RESULT


@dataclass(frozen=True)
class StoredTrial:
    """A trial's files and numbers; `folder` holds the files as long as this object exists."""

    source: str
    """What it was fetched from: a run, a model version, a folder or an archive."""
    folder: Path
    run_id: str
    config: DictConfig
    qconfig: QConfig
    requested: QConfig
    scales: Mapping[str, Any]
    quantizers: Mapping[str, Any]
    manifest: Mapping[str, Any]
    sensitivities: SensitivityTable | None
    metrics: Mapping[str, float]
    """As computed, not rounded as on the run."""
    tags: Mapping[str, str]
    files: Mapping[str, str]
    """SHA-256 of each file of the trial by name."""
    keeper: Any = field(default=None, repr=False, compare=False)
    """Removes a temporary folder when this object is freed."""

    @property
    def weights(self) -> Path | None:
        """The float weights, trained ones included; None if they are those of the model's own code."""
        return self.folder / WEIGHTS if WEIGHTS in self.files else None

    @property
    def trained(self) -> bool:
        """True if the trial was trained."""
        return "training.json" in self.files

    @property
    def profile(self) -> Path | None:
        """The measured report that the latencies follow."""
        return self.folder / PROFILE if (self.folder / PROFILE).is_file() else None


def read_stored(
    folder: Path, source: str, run_id: str, tags: Mapping[str, str], expected: str, keeper: Any = None
) -> StoredTrial:
    """Verify the files in `folder` against the digest `expected` over them, and read them as data.

    `tags` are those of the run. Raises BundleError, in one line, for anything that is not as qflow wrote it.
    """
    check_names(regular_files(folder, source), source)
    files = digests(folder)
    if files_digest(files) != expected:
        raise BundleError(
            f"Files of {source} are as they were written (tag {DIGEST}), but got others. Take another source."
        )
    try:
        return _read(folder, source, run_id, tags, files, keeper)
    except BundleError:
        raise
    except (QflowError, LookupError, TypeError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise BundleError(f"Files of {source} hold what qflow writes, but got: {text} Take another source.") from error


def _read(
    folder: Path, source: str, run_id: str, tags: Mapping[str, str], files: Mapping[str, str], keeper: Any
) -> StoredTrial:
    manifest = _mapping(read_json(folder, "manifest.json"), "manifest.json")
    for name in EXAMPLE:
        if (folder / name).is_file():
            _check_example(folder, manifest, source)
    config = read_config(folder)
    if config.device.profile:
        copy = folder / PROFILE
        if not copy.is_file():
            raise BundleError(f"{source} names a measured report, but got no copy of it. Take another source.")
        config.device.profile = str(copy)
    marker = Marker.from_json(tags[RESULT])
    metrics = {name: float(value) for name, value in marker.outcome.metrics.items()}
    if odd := [name for name, value in metrics.items() if math.isnan(value)]:
        raise BundleError(f"Metrics of {source} are numbers, but got NaN for {odd[0]}. Take another source.")
    texts.check_names(plain(config), tags, metrics)
    record = "sensitivity_record.json" if "sensitivity_record.json" in files else ""
    scales = _mapping(read_json(folder, "qconfig/scales.json"), "scales.json")
    if digest(scales) != tags.get("qflow.scales"):
        raise BundleError(f"Scales of {source} are those of its tag qflow.scales, but got others. Take another source.")
    return StoredTrial(
        source=source,
        folder=folder,
        run_id=run_id,
        config=config,
        qconfig=from_dict(QConfig, read_json(folder, "qconfig/qconfig.json")),
        requested=from_dict(QConfig, read_json(folder, "qconfig/requested.json")),
        scales=scales,
        quantizers=_mapping(read_json(folder, "qconfig/quantizers.json"), "quantizers.json"),
        manifest=manifest,
        sensitivities=from_dict(SensitivityTable, read_json(folder, record)) if record else None,
        metrics=metrics,
        tags=dict(tags),
        files=files,
        keeper=keeper,
    )


def _check_example(folder: Path, manifest: Mapping[str, Any], source: str) -> None:
    if example_digest(folder) != manifest.get("example"):
        raise BundleError(
            f"The input example of {source} is the study's (manifest.json), but got another. Take another source."
        )


def example_digest(folder: Path) -> str:
    """Return the digest over the files of an input example; empty if there is none."""
    found = digests_of_example(folder)
    return files_digest(found) if len(found) == len(EXAMPLE) else ""


def digests_of_example(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files of an input example that are in `folder`."""
    from qflow.core.record import sha256

    return {name: sha256(folder / name) for name in EXAMPLE if (folder / name).is_file()}


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BundleError(f"{name} holds a mapping, but got {type(value).__name__}. Take another source.")
    return value


def config_of(trial: StoredTrial) -> dict[str, Any]:
    """Return the configuration of a trial as plain containers."""
    found: dict[str, Any] = plain(trial.config)
    return found


def record_of(trial: StoredTrial) -> str:
    """Return the text of bundle.json: what a folder or archive keeps of the run beside its files."""
    kept = {name: value for name, value in trial.tags.items() if name.startswith("qflow.")}
    return json.dumps(
        {"schema": 1, "run_id": trial.run_id, "tags": kept, "files": dict(trial.files)}, indent=1, sort_keys=True
    )
