"""A file of the plugin, of HMCT or of an export as one side of a comparison: its dtypes, under the other side's names.

Nothing is known of the model but the names of its operators; so a file of HMCT, which needs its graph, is refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qflow.core.errors import ConfigError
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.imports.read import read_mix_by_names
from qflow.imports.records import IN_MODEL, Imported
from qflow.study.comparison import Side

SUFFIXES = (".pt", ".txt", ".py")
"""Of files that name the operators of a model in their own way; a .json of qflow names them as a run does."""


def side_of_file(path: Path, against: Side | None) -> tuple[Side, Imported]:
    """Return what is compared of a file with `against`, and what did not match. Raises ConfigError for another file."""
    if against is None:
        raise ConfigError(
            f"A file is compared with a trial, whose operators it names, but got {path.name} and none. Name a run too."
        )
    found = read_mix_by_names(path, tuple(against.qconfig.ops))
    if not any("output" in op or "weight" in op for op in found.modules.values()):
        raise ConfigError(f"A comparison is one of dtypes, but got {path.name} with {found.kind}. Name another file.")
    ops = {name: _changed(op, found.modules.get(name, {})) for name, op in against.qconfig.ops.items()}
    side = Side(str(path), f"{found.kind} of {path.name}", QConfig(against.qconfig.march, ops))
    return side, found


def notes(found: Imported) -> list[str]:
    """Return what is said of a file beside a comparison: names without a counterpart, and what is not compared."""
    scales = [f"{len(found.scales)} scales of {found.source} are not compared"] if found.scales else []
    taken = {IN_MODEL: ", taken as in the other"}
    return [*scales, *(f"{group}{taken.get(group, '')}: {text}" for group, text in found.lines())]


def _changed(op: OpQConfig, fields: dict[str, Any] | Any) -> OpQConfig:
    return replace(op, **{key: value for key, value in fields.items() if key in ("output", "weight", "input")})
