"""What `search.start` names: the files of the user's present mix, and what a study makes of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflow.config.settings import plain
from qflow.core.errors import ConfigError
from qflow.core.text_file import require_file
from qflow.imports.records import Imported

if TYPE_CHECKING:
    from omegaconf import DictConfig

RULE = "search.start is a file with a mix, or a list of them"


def start_files(config: DictConfig) -> list[Path]:
    """Return the files of `search.start`; none where it is null. Raises ConfigError for paths that are no files."""
    given = plain(config.search).get("start")
    if given is None:
        return []
    paths = given if isinstance(given, list) else [given]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ConfigError(f"{RULE}, but got {given!a:.80}. Name it: search.start=qconfig_dtypes.pt.")
    files = [Path(os.path.expanduser(path)) for path in paths]
    for file in files:
        require_file(file, RULE)
    return files


@dataclass(frozen=True)
class StartMix:
    """What was read, and the values of its trial."""

    imported: Imported
    values: Mapping[str, Any]
    fixed: int
    """How many scales of outputs the trial takes from the files."""


def entry_of(start: StartMix | None) -> dict[str, str]:
    """Return the entry of the manifest by which a study knows the content of the files again; nothing without them."""
    return {"start": start.imported.digest} if start else {}
