"""The arguments of `prepare` and `QuantAnalysis`, converted from the plugin's forms to those of qflow's functions."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from qflow.analysis.layers.compare import is_of
from qflow.analysis.layers.rows import group_type
from qflow.analysis.sensitivity.candidates import Candidate
from qflow.core.errors import ConfigError
from qflow.core.setter import Setter

Names = str | type | Sequence[str | type] | None
"""Names of modules, of types, or classes: one or several."""


def metric_name(name: str, known: Sequence[str]) -> str:
    """Return the metric in the spelling of `known`. Raises ConfigError."""
    for metric in known:
        if str(name).casefold() == metric.casefold():
            return metric
    raise ConfigError(f"A metric is one of {', '.join(known)}, in any case, but got {name!r}.")


def whole(name: str, value: Any, of: str) -> None:
    """Raise ConfigError unless `value` is a whole number of at least 1."""
    if not isinstance(value, Integral) or int(value) < 1:
        raise ConfigError(f"{name} is 1 or more {of}, but got {value!r}. Give a whole number.")


def folder_at(path: str | Path) -> Path:
    """Create the folder `path` if it is missing, and return it. Raises ConfigError if that fails."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"out_dir is a folder that can be made, but got {path} ({reason}). Give another.") from error
    return Path(path)


def chosen_rows(rows: Sequence[Candidate], prefixes: tuple[str, ...], types: tuple[str, ...]) -> Sequence[Candidate]:
    """Filter rows as `filtered` does for layers. Raises ConfigError if no row is left."""
    if not prefixes and not types:
        return rows
    found = [
        row for row in rows if row.name.startswith(prefixes) or is_of(types, row.node.op_type, group_type(row.node))
    ]
    if not found:
        raise ConfigError(f"prefixes and types choose rows, but got none by {prefixes} and {types}. Give others.")
    return found


def filters(prefixes: Names, types: Names) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return both as tuples of names."""
    return names_of(prefixes), names_of(types)


def names_of(given: Names) -> tuple[str, ...]:
    """Return one name or several as a tuple; a class becomes its full name."""
    several = (given,) if isinstance(given, (str, type)) else tuple(given or ())
    return tuple(f"{v.__module__}.{v.__qualname__}" if isinstance(v, type) else v for v in several)


def setters_of(given: Any) -> tuple[Setter, ...]:
    """Return one setter or several as a tuple. Raises ConfigError for anything that is not a setter."""
    found = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for setter in found:
        if not callable(setter) or isinstance(setter, type):
            raise ConfigError(
                f"A qconfig_setter is called with (node, graph), but got {type(setter).__name__}. For names write "
                "qflow.ModuleNameQconfigSetter({name: qconfig}), for all qflow.TemplateSetter('qint16')."
            )
    return found
