"""What MLflow takes as a name or a value, and how longer texts are kept.

MLflow 3 cuts a param at 6000 characters and a tag at 8000 without an error, or refuses it
(MLFLOW_TRUNCATE_LONG_VALUES=false). Metrics and params have names of letters, digits, blanks and `_ - . / :`, of at
most 250 characters; experiments have any name of 1 to 500 characters; registered models have one without `/` and `:`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qflow.core.errors import ConfigError, TrackingError
from qflow.core.names import CONTROL
from qflow.core.record import digest
from qflow.core.stored_text import stored_text

PARAM = 6000  # characters of a param's value
TAG = 8000  # characters of a tag's value
KEY = 250  # characters of a name
EXPERIMENT = 500  # characters of an experiment's name
PREFIX = 50  # characters that are left for what stands before a metric's name, as in all_int16/<name>
TAKEN = "drop"  # accuracy/drop is a metric of each trial, beside accuracy/<name of the task's metric>
NOTE = "mlflow.note.content"  # shown by MLflow's UI as it stands


def check_metric_name(name: str) -> None:
    """Raise ConfigError for a metric's name that MLflow would refuse once the metric has been measured."""
    parts = re.sub(r"[^/\w.\- :]", "_", name)[: KEY - PREFIX].split("/")
    clean = "/".join(part for part in parts if part.strip(". "))  # MLflow refuses `//`, `/./` and `/../`
    if name == TAKEN:
        raise ConfigError(
            f"accuracy/{TAKEN} is the loss against float, so a metric has another name, but got {name!r}. Give the "
            f"metric another: name = 'mean_{TAKEN}'."
        )
    if clean != name:
        raise ConfigError(
            f"A metric's name is letters, digits, blanks and _ - . / : with at most {KEY - PREFIX} characters, but got "
            f"{name[:60]!r}{'...' if len(name) > 60 else ''}. Give the metric another: name = {clean[:60]!r}."
        )


def param_name(key: str) -> str:
    """Return `key` with `_` for each character that MLflow does not allow, and with a digest for what is too long."""
    clean = re.sub(r"[^\w.\-/ :]", "_", key)
    return clean if len(clean) <= KEY else f"{clean[: KEY - 17]}_{digest(key)}"


def check_experiment_name(name: str) -> None:
    """Raise ConfigError for an experiment's name that MLflow would refuse."""
    odd = stored_text(name) != name or CONTROL.search(name)
    if not 1 <= len(name) <= EXPERIMENT or odd:
        got = f"{name[:60]!a}" if odd else f"{len(name)}"
        raise ConfigError(
            f"tracking.experiment has 1 to {EXPERIMENT} characters that UTF-8 knows and a line shows, but got {got}. "
            "Name one: tracking.experiment=<name>."
        )


def model_name(name: str) -> str:
    """Return the registered model's name: `name` with `-` for `/` and `:`. Raises ConfigError if nothing is left."""
    clean = re.sub(r"[/:]", "-", name)
    if not clean.strip(" .-"):
        raise ConfigError(
            f"A registered model has a name with letters, but got {name!r}. Name it: tracking.registered_model=<name>."
        )
    if len(clean) > KEY or CONTROL.search(clean):
        raise ConfigError(
            f"A registered model's name has at most {KEY} characters, all of which a line shows, but got "
            f"{name[:60]!a}. Name it: tracking.registered_model=<name>."
        )
    return clean


def quoted(name: str) -> str:
    """Return a study's name as a text of a query. Raises TrackingError for one with quotes."""
    if "'" in name:
        raise TrackingError(f"A study name holds no quotes, but got {name!r}. Correct it.")
    return f"'{name}'"


def runs_of(study: str, kind: str) -> str:
    """Return the query for the runs of a study: its own (kind study) or those of its trials (kind trial)."""
    return f"tags.`qflow.study` = {quoted(study)} and tags.`qflow.kind` = '{kind}'"


def rounded(value: float) -> float:
    """Return `value` with 6 significant digits, because MLflow's run list prints every digit."""
    return float(f"{value:.6g}")


def param_value(value: object) -> str:
    """Return the text of a param, with an ellipsis where it is cut."""
    return stored_text(str(value), PARAM)


def tag_parts(tags: Mapping[str, str]) -> dict[str, str]:
    """Return `tags` with each long text in parts: a part of 8000 characters goes on under `<key>.2`, `<key>.3`, ...

    A part of exactly 8000 characters always has a next one, which may be empty; so no part of an older and longer text
    is taken for the end of a newer one.
    """
    found: dict[str, str] = {}
    for key, value in tags.items():
        text = stored_text(str(value))
        if key == NOTE:
            found[key] = text if len(text) < TAG else f"{text[: TAG - 2]}…"
            continue
        parts = [text[at : at + TAG] for at in range(0, len(text) + 1, TAG)]
        found |= {_part(key, number): part for number, part in enumerate(parts, 1)}
    return found


def joined(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that `tag_parts` has split, with whole texts; parts stay in it under their own keys."""
    found = dict(tags)
    for key, value in tags.items():
        number, part = 1, value
        while len(part) == TAG:
            number += 1
            part = tags.get(_part(key, number), "")
            found[key] += part
    return found


def _part(key: str, number: int) -> str:
    return key if number == 1 else f"{key}.{number}"
