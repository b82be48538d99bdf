"""Saves the state of a long search for bad cases in a file that stays complete if the process is killed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qflow.core.errors import ConfigError
from qflow.core.store import written_aside


def write_state(path: Path, settings: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Write `state` beside `path`; the new file then replaces `path`."""
    with written_aside(path) as aside, aside.open("wb") as file:
        torch.save({"settings": dict(settings), "state": dict(state)}, file)
        file.flush()
        os.fsync(file.fileno())


def read_state(path: Path, settings: Mapping[str, str]) -> dict[str, Any] | None:
    """The state that was written under the same `settings`; None if there is none yet.

    Raises ConfigError if it was written under other settings (data, model, metric, ...) or is not a state file.
    """
    if not path.exists():
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        theirs, state = dict(found["settings"]), dict(found["state"])
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"A bad-case state is a file of find_badcases, but got {type(error).__name__} reading {path}. Remove it."
        ) from error
    for name, wanted in settings.items():
        if theirs.get(name) != wanted:
            raise ConfigError(
                f"A bad-case state continues its own search, {name} {wanted}, but got {theirs.get(name)} in {path}. "
                "Remove it or give another path."
            )
    return state
