"""The names of studies and tasks, which become names of folders, of lock files and of queries for runs."""

from __future__ import annotations

import re
from urllib.parse import quote

from qflow.core.errors import ConfigError

NAME_BYTES = 200  # of a study's name in percent-encoding, so that it fits a file's name

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that no name has: they add lines to a terminal, change it, turn a line's direction, or are no text."""


def check_study_name(name: str) -> None:
    """Raise ConfigError for a name with other characters than words, dots, dashes and slashes, or a too long one."""
    if not re.fullmatch(r"[\w.+=@-]+(/[\w.+=@-]+)*", name) or _leaves_folder(name):
        clean = "/".join(part for part in re.sub(r"[^\w.+=@/-]+", "-", name).split("/") if part.strip(".-"))
        raise ConfigError(
            f"A study name is words, dots, dashes and slashes, but got {name!r}. Rename it: study={clean or 'mine'}."
        )
    if (size := len(quote(name, safe=""))) > NAME_BYTES:
        raise ConfigError(
            f"A study name has at most {NAME_BYTES} characters, where / counts 3 and one beyond ASCII up to 12, but "
            f"got {size}. Rename it: study={name[:12].rstrip('/')}."
        )


def shown_name(name: str) -> str:
    """Return a name from a store as a line shows it: with its control characters written out."""
    return CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), name)


def trial_name(number: int, label: str) -> str:
    """Return the name of a trial: `trial 3 all-int8`; those by hand, which are no trials of the search, count down."""
    return f"trial {number} {label}".strip() if number >= 0 else f"{label} {-number}"


def check_task_name(name: str) -> None:
    """Raise ConfigError for a name with quotes, backslashes or control characters, or with an empty or dotted part."""
    if _leaves_folder(name) or not set("'\\").isdisjoint(name) or not name.isprintable() or len(name) > NAME_BYTES:
        clean = "/".join(part for part in re.sub(r"[^\w.+=@/ -]+", "-", name).split("/") if part.strip(". -"))
        raise ConfigError(
            f"A task's name has at most {NAME_BYTES} characters, no quotes, and words between slashes, but got "
            f"{name[:60]!r}. Rename it: task.name={clean[:60] or 'mine'}."
        )


def _leaves_folder(name: str) -> bool:
    return any(not part.strip(". ") for part in name.split("/"))
