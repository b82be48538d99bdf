"""Tensor arguments of a torch function in the order of its parameters, however they were passed."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from qflow.quant.trace.tape import tensors_in


def value_slots(function: Any, args: Any, kwargs: Any) -> list[tuple[int, Tensor]]:
    """Tensors with their slot (place among the call's tensors), in parameter order, without the tensor of `out=`."""
    found = list(enumerate(tensors_in(args)))
    named: dict[str, list[tuple[int, Tensor]]] = {}
    slot = len(found)
    for key, value in kwargs.items():
        tensors = tensors_in(value)
        if tensors and key != "out":
            named[key] = list(enumerate(tensors, slot))
        slot += len(tensors)
    order = _parameters(function) if len(named) > 1 else ()
    for key in sorted(named, key=lambda k: order.index(k) if k in order else len(order)):
        found += named[key]
    return found


@functools.lru_cache(maxsize=256)
def _parameters(function: Any) -> tuple[str, ...]:
    """Parameter names; builtins have no signature, but torch keeps one for each in its testing overrides."""
    for known in (torch.overrides.get_testing_overrides().get(function), function):
        try:
            return tuple(inspect.signature(known).parameters)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            continue
    return ()
