"""Finds the attributes in which a model keeps state from call to call, so that a refusal can name them.

Many models write attributes that no call reads (the last attention map) or fill a cache once; neither is state. So the
attributes that a call changed are tried out: the model is called with the value from before, and with that of another
call. An attribute is state if an output then differs, or another attribute that is state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten

from qflow.quant.trace.calling import call_model, named_tensors
from qflow.quant.trace.state import State, copied_state, put_state, state_of

_PLAIN = (type(None), bool, int, float, str)
_OWN = frozenset(vars(nn.Module()))
"""Attributes of every module: its parameters, hooks and mode."""


def held_values(model: nn.Module) -> State:
    """Copies of all values that may be state, by path: buffers, and plain attributes of tensors and numbers.

    An attribute that is an object is looked into for such attributes of its own.
    """
    found: State = {}
    for path, module in model.named_modules():
        kept = {name: value for name, value in vars(module).items() if name not in _OWN}
        for name, value in [*module._buffers.items(), *kept.items()]:
            place = f"{path}.{name}" if path else name
            inner = {"": value} if _is_value(value) else _inside(value)
            found.update({place + rest: v for rest, v in inner.items()})
    return {path: copied_state(value) for path, value in found.items()}


def parameter_values(model: nn.Module) -> State:
    """Copies of all parameters that have a shape, by path."""
    return {path: v.detach().clone() for path, v in model.named_parameters() if not is_lazy(v)}


def changed(before: State, after: State) -> list[str]:
    """Paths whose values differ."""
    return [path for path in after if path not in before or not _equal(before[path], after[path])]


def unnamed_state(model: nn.Module, inputs: Any, other: Any, before: State) -> list[str]:
    """Attributes that a call changes and a later call reads. `before` are the values before a first call on `inputs`.

    `other` are inputs with other values. The attributes are left as the first call left them.
    """
    first = held_values(model)
    suspects = [path for path in changed(before, first) if path in before]
    buffers = {name for name, _ in model.named_buffers() if before.get(name) is not None}  # others may be caches
    certain = [path for path in suspects if path in buffers]
    suspects = [path for path in suspects if path not in buffers]
    if not suspects:
        return certain
    own = state_of(model, suspects)
    try:
        return certain + _read(model, inputs, other, {p: before[p] for p in suspects}, {p: first[p] for p in suspects})
    finally:
        put_state(model, own)


def _read(model: nn.Module, inputs: Any, other: Any, start: State, first: State) -> list[str]:
    _after(model, other, first)
    second = copied_state(_now(model, first))
    plain = _after(model, inputs, first)
    if not _equal(plain, _after(model, inputs, first)) or plain is None:
        return []  # at random, or it does not run twice: other checks say so
    values = [start, second]
    if all(_outputs_equal(plain, _after(model, inputs, value)) for value in values):
        return []
    reached: dict[str, set[str]] = {}  # attribute -> what its value decides: attributes, and "" for an output
    for path in first:
        found = [_after(model, inputs, {**first, path: value[path]}) for value in values]
        reached[path] = {name for got in found for name in _differences(plain, got) if name != path}
    state = {path for path in first if "" in reached[path]}
    while more := {path for path in first if path not in state and reached[path] & state}:
        state |= more
    return [path for path in first if path in state]


def _after(model: nn.Module, inputs: Any, state: State) -> tuple[Any, State] | None:
    """Outputs of a call from `state`, and the attributes after it; None if it raises."""
    put_state(model, copied_state(state))
    try:
        with torch.no_grad():
            outputs = named_tensors(call_model(model, inputs))
    except Exception:  # values that do not go together
        return None
    return copied_state(dict(outputs)), copied_state(_now(model, state))


def _now(model: nn.Module, state: State) -> State:
    found = held_values(model)
    return {path: found.get(path) for path in state}


def _differences(a: tuple[Any, State], b: tuple[Any, State] | None) -> set[str]:
    if b is None:
        return {""}
    return {*([] if _equal(a[0], b[0]) else [""]), *changed(a[1], b[1])}


def _outputs_equal(a: tuple[Any, State], b: tuple[Any, State] | None) -> bool:
    return b is not None and _equal(a[0], b[0])


def _is_value(value: Any) -> bool:
    if isinstance(value, (Tensor, *_PLAIN)):
        return not isinstance(value, nn.Parameter)
    if isinstance(value, Mapping):
        return all(map(_is_value, value.values()))
    return isinstance(value, (list, tuple, deque)) and all(map(_is_value, value))


def _inside(value: Any) -> State:
    """The values among the attributes of an object, by `.name`."""
    library = type(value).__module__.partition(".")[0]
    if isinstance(value, (type, nn.Module)) or library in ("torch", "builtins"):
        return {}
    return {f".{name}": v for name, v in getattr(value, "__dict__", {}).items() if _is_value(v)}


def _equal(a: Any, b: Any) -> bool:
    if type(a) is type(b) and type(a) in _PLAIN:
        return bool(a == b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(_filled(a), _filled(b)))
    (ours, form), (theirs, other) = tree_flatten(a), tree_flatten(b)
    if len(ours) == 1 and ours[0] is a:
        return type(a) is type(b) and bool(a == b)
    return form == other and all(map(_equal, ours, theirs))


def _filled(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num() if tensor.is_floating_point() else tensor
