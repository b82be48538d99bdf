"""The arguments that a model's `forward` takes from a batch that is a mapping."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def arguments(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the parameters of `forward` without *args and **kwargs."""
    found = inspect.signature(forward).parameters.values()
    return [p for p in found if p.kind in (*_NAMED, inspect.Parameter.POSITIONAL_ONLY)]


def keywords(forward: Callable[..., Any], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the items of `batch` that are arguments of `forward`, in its order; all if it takes **kwargs."""
    parameters = inspect.signature(forward).parameters.values()
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    return {p.name: batch[p.name] for p in parameters if p.kind in _NAMED and p.name in batch}


def mismatch(forward: Callable[..., Any], inputs: Any) -> str:
    """Return a text with keys and arguments if a mapping does not fit `forward`; empty if it fits."""
    given = inputs if isinstance(inputs, Mapping) else None
    if given is None and isinstance(inputs, Sequence) and len(inputs) == 1 and isinstance(inputs[0], Mapping):
        given = inputs[0]
    if given is None:
        return ""
    taken = arguments(forward)
    needed = {p.name for p in taken if p.default is p.empty}
    if not taken or (given is inputs and needed <= set(given)):
        return ""
    names = ", ".join(p.name for p in taken)
    return f" (the batch has the keys {', '.join(map(str, given))}, forward takes {names})"
