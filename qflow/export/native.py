"""Target `qflow`: one JSON with the qconfig, all scales and versions, which `read_native` reads back.

The file holds everything that the quantized forward reads beside the float weights, so that two models with equal
weights and equal digests compute the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qflow.config.device_file import load_rules
from qflow.core.errors import QflowError
from qflow.core.qconfig import QConfig
from qflow.core.record import digest, from_dict, plain, to_json
from qflow.core.settings import CalibrationSettings
from qflow.core.version import VERSION
from qflow.export.contract import Exported, ExportError, Subject, applied_fallbacks, written
from qflow.quant.model.model_state import forward_state
from qflow.tasks.identity import weights_digest

NAME = "qflow.json"
FORMAT = "qflow qconfig with scales"
SCHEMA = 1
LARGEST = 256 << 20  # bytes; a model of 1,000 operators has 2 MB


@dataclass(frozen=True)
class Native:
    """The content of the file."""

    march: str
    oe_version: str
    requested: QConfig
    applied: QConfig
    calibration: CalibrationSettings
    quantizers: Mapping[str, Any]
    """Dtype, switches and axis of every quantizer (`states`), and their scales by name (`scales`: those of outputs, of
    weights, of requantized inputs)."""
    weights: str
    """Digest of the float weights that the scales belong to."""
    versions: Mapping[str, str]

    @property
    def digest(self) -> str:
        """Digest of the content: equal digests mean equal files."""
        return digest(self)


def export(subject: Subject, folder: Path) -> Exported:
    """Write `qflow.json`."""
    content = native(subject)
    record = {"format": FORMAT, "schema": SCHEMA, "digest": content.digest, **plain(content)}
    (folder / NAME).write_text(to_json(record, indent=1) + "\n")
    return Exported("qflow", written(folder), applied_fallbacks(subject.prepared))


def native(subject: Subject) -> Native:
    """Return the content of the file for a calibrated model."""
    import torch

    prepared, rules = subject.prepared, load_rules(subject.prepared.march)
    prepared.follow_weights()
    return Native(
        rules.march,
        str(rules.oe_version),
        prepared.requested,
        prepared.applied,
        prepared.settings,
        plain(forward_state(prepared)),  # type: ignore[arg-type]
        weights_digest(prepared.model),
        {"qflow": VERSION, "torch": torch.__version__.partition("+")[0]},
    )


def read_native(path: str | Path) -> Native:
    """Return the content of a file that `export` wrote. Raises ExportError, in one line, for any other file."""
    path = Path(path)
    record = _record(path)
    stated = record.pop("digest", None)
    del record["format"], record["schema"]
    try:
        unknown = sorted(set(record) ^ {field.name for field in fields(Native)})
        if unknown:
            raise ExportError(f"keys {', '.join(unknown)[:80]}")
        content = from_dict(Native, record)
    except (QflowError, LookupError, TypeError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:120]
        raise _damaged(path, text) from error
    if content.digest != stated:
        raise _damaged(path, f"content with the digest {content.digest} where it states {stated!s:.40}")
    return content


def _record(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        if path.stat().st_size > LARGEST:
            raise _damaged(path, f"more than {LARGEST} bytes")
        record = json.loads(path.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise ExportError(f"An export is read from {NAME}, but got {path}: {error.strerror}. Name its path.") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"no JSON ({' '.join(str(error).split())[:80]})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _damaged(path, "another format")
    if record.get("schema") != SCHEMA:
        raise _damaged(path, f"schema {record.get('schema')!s:.20}, and this qflow reads {SCHEMA}")
    return record


def _damaged(path: Path, what: str) -> ExportError:
    return ExportError(f"{path} is a file of the target qflow, but got {what}. Export it again: target=qflow.")
