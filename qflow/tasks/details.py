"""What a metric says beside its value: named numbers, such as one a class, which stand on the run of each trial.

A metric with `update` and `compute` may have a method `details() -> dict[str, float]`. It is called after `compute`,
and each number is logged as `detail/<name>`, of the float model as `float/detail/<name>`. Goals and searches read the
metric alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qflow.core.errors import ConfigError

LONGEST = 200  # characters of a name, so that a run's metric may have it


def details_of(metric: Any) -> dict[str, float]:
    """The details of a metric that has just computed its value; empty for a metric without any.

    A number that is not finite is left out: it says that the data hold nothing to measure, such as a class without
    samples. A character that no run takes in a name is replaced by `_`, and a name that is then taken gets a number.
    Raises ConfigError for anything else than numbers by name, and for what the user's method raises.
    """
    if not hasattr(metric, "details"):
        return {}
    try:
        found = metric.details()
        named = [(str(name), float(value)) for name, value in found.items()]
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"details() of a metric gives numbers by name, but got {type(error).__name__}: "
            f"{' '.join(str(error).split())}. Return a dict[str, float]."
        ) from error
    details: dict[str, float] = {}
    for name, value in named:
        if math.isfinite(value):
            details[_free(_clean(name), details)] = value
    return details


def _clean(name: str) -> str:
    """A name as MLflow takes it: letters, digits, blanks and `_ - . / :`, no empty or dotted part."""
    parts = re.sub(r"[^/\w.\- :]", "_", name)[:LONGEST].split("/")
    return "/".join(part for part in parts if part.strip(". ")) or "_"


def _free(name: str, taken: Mapping[str, float]) -> str:
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name} {number}"
    return found
