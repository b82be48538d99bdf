"""Modules that a setting names: by path, by class name, or by class."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from qflow.core.errors import ModelError

Named = str | type[nn.Module] | Sequence[str | type[nn.Module]]
"""Modules by path, class name or class; one, or several."""


def matching(model: nn.Module, names: Named, setting: str) -> frozenset[str]:
    """Paths of the modules that `names` stand for. Raises ModelError, which names `setting`, if one has no match.

    An object that has several places in the model is found by each of them, and given by its first one.
    """
    if isinstance(names, (str, type)):
        names = (names,)
    first = {id(module): path for path, module in model.named_modules()}
    found: set[str] = set()
    for wanted in names:
        paths = {
            first[id(module)]
            for path, module in model.named_modules(remove_duplicate=False)
            if path and (path == wanted or type(module).__name__ == wanted or type(module) is wanted)
        }
        if not paths:
            raise ModelError(
                f"{setting} names modules or classes of the model, but got {_name_of(wanted)!r}. "
                f"{_nearest(model, _name_of(wanted))}"
            )
        found |= paths
    return frozenset(found)


def _name_of(wanted: str | type[nn.Module]) -> str:
    return wanted if isinstance(wanted, str) else wanted.__name__


def _nearest(model: nn.Module, wanted: str) -> str:
    """A hint with the names most similar to `wanted`, else with the first names of the model."""
    inside = dict(list(model.named_modules())[1:])
    names = list(dict.fromkeys([*inside, *(type(m).__name__ for m in inside.values())]))
    close = difflib.get_close_matches(wanted, names, 3) or [n for n in names if wanted.lower() in n.lower()][:3]
    if close:
        return f"Did you mean {', '.join(close)}?"
    return f"There are: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
