"""The folder conf/ of the working folder, whose files are options beside the shipped ones: `task=mine`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qflow.config.keys import conf_dir, own_conf_dir
from qflow.core.errors import ConfigError

PLACED = ("--config-dir", "-cd", "hydra.searchpath")
"""With one of these the user says where files are."""


def own_conf(arguments: Sequence[str]) -> list[Path]:
    """Return conf/ of the working folder, or nothing if there is none or the user names other places.

    Raises ConfigError if an option that is chosen is both there and shipped: the shipped file would be taken.
    """
    place = own_conf_dir()
    if place is None or any(text.startswith(PLACED) for text in arguments):
        return []
    for argument in arguments:
        group, _, option = argument.lstrip("+").partition("=")
        file = f"{group}/{option}.yaml"
        if option and (place / file).is_file() and (conf_dir() / file).is_file():
            raise ConfigError(
                f"A file of your own has another name than a shipped one, but got conf/{file}. Rename it."
            )
    return [place]
