"""How a model is called on the inputs of a batch, and the names of its input and output tensors."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qflow.quant.trace.state import PREFIX, Frame, FrameOutputs, State, copied_state, put_state, state_of
from qflow.quant.trace.tape import tensors_in

_OTHERS = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}
"""Packages whose objects are no containers of the user's."""


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Run `model` on a copy of `inputs`: a tuple or list is splatted, a dict becomes keyword arguments.

    The inputs are copied because a model may write into them, and the batch must stay unchanged for its next use.
    On a `Frame` the model runs from the state of the frame, gives `FrameOutputs`, and keeps its own state.
    """
    return run_model(model, copied(inputs))


def copied(inputs: Any) -> Any:
    """The same structure with its tensors cloned."""
    if isinstance(inputs, Frame):
        return Frame(copied(inputs.inputs), copied_state(inputs.state), inputs.outputs)
    return map_named(lambda name, tensor: tensor.clone(), inputs)


def run_model(model: nn.Module, inputs: Any) -> Any:
    """As `call_model`, but on `inputs` themselves."""
    if isinstance(inputs, Frame):
        return _run_frame(model, inputs)
    # torch's fused encoder layer computes other values than its parts, and is not used while the model is traced
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _run_frame(model: nn.Module, frame: Frame) -> FrameOutputs:
    own = state_of(model, tuple(frame.state))
    put_state(model, frame.state)
    try:
        outputs = run_model(model, frame.inputs)
        after = state_of(model, tuple(frame.state))
    finally:
        put_state(model, own)
    tensors = state_tensors(after)
    if frame.outputs is not None:
        found = dict(tensors)
        tensors = [(output, found[name]) for name, output in frame.outputs if name in found]
    return FrameOutputs(outputs, tuple(tensors), after)


def state_tensors(state: State) -> list[tuple[str, Tensor]]:
    """The tensors of a temporal state with their names (state.py)."""
    return [pair for path, value in state.items() for pair in named_tensors(value, PREFIX + path)]


def fresh_state(outputs: FrameOutputs, moved: Callable[[Tensor], bool]) -> list[tuple[str, str, Tensor]]:
    """The state tensors that a call computed and does not return: name, name as an output, tensor.

    `moved` is True for tensors that were given to the call. An attribute with one fresh tensor gives it its own name,
    because the place of the newest entry in a queue changes while the queue fills.
    """
    seen = {id(tensor) for _, tensor in named_tensors(outputs.outputs)}
    found = []
    for path, value in outputs.after.items():
        own = [(n, t) for n, t in named_tensors(value, PREFIX + path) if id(t) not in seen and not moved(t)]
        seen |= {id(tensor) for _, tensor in own}
        found += [(name, PREFIX + path if len(own) == 1 else name, tensor) for name, tensor in own]
    return found


def next_state(model: nn.Module, inputs: Any, state: State) -> tuple[Frame, State]:
    """`inputs` as a frame of the float `model`, whose outputs are what it computes on it, and the state after it."""
    frame = copied(Frame(inputs, state))
    given = {id(tensor): tensor._version for _, tensor in input_tensors(model, frame)}
    with torch.no_grad():
        found = run_model(model, frame)
    fresh = fresh_state(found, lambda t: given.get(id(t), -1) == t._version)
    outputs = tuple((name, output) for name, output, tensor in fresh if tensor.is_floating_point())
    return Frame(inputs, state, outputs), found.after


def named_tensors(structure: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Tensors of nested outputs with the plugin's names: positions and keys joined by `-` (`0-1`, `p3-cls`)."""
    if isinstance(structure, Tensor):
        return [(prefix or "0", structure)]
    if isinstance(structure, FrameOutputs):
        return [*named_tensors(structure.outputs, prefix), *structure.tensors]
    if isinstance(structure, Mapping):
        return [
            pair
            for key, value in structure.items()
            for pair in named_tensors(value, f"{prefix}-{key}" if prefix else str(key))
        ]
    if isinstance(structure, (tuple, list, deque)):
        return [
            pair
            for i, value in enumerate(structure)
            for pair in named_tensors(value, f"{prefix}-{i}" if prefix else str(i))
        ]
    return named_tensors(attributes(structure), prefix) if attributes(structure) else []


def all_tensors(structure: Any) -> list[Tensor]:
    """The tensors of nested arguments, in order, and then those inside objects, which torch's pytrees do not open."""
    found = tensors_in(structure)
    return [*found, *(t for _, t in named_tensors(structure) if not any(t is f for f in found))]


def attributes(structure: Any) -> dict[str, Any]:
    """Fields of a dataclass, or attributes of an object of the user's that holds tensors; empty for anything else.

    Of a plain object only tensors and containers count: it may refer to anything, also to what refers back to it.
    """
    kind = type(structure)
    if hasattr(kind, "__dataclass_fields__"):
        return {key: getattr(structure, key) for key in kind.__dataclass_fields__ if hasattr(structure, key)}
    if isinstance(structure, (type, nn.Module)) or callable(structure) or kind.__module__.partition(".")[0] in _OTHERS:
        return {}
    slots = [name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(structure, name)]
    held = {**getattr(structure, "__dict__", {}), **{name: getattr(structure, name) for name in slots}}
    return {key: v for key, v in held.items() if isinstance(v, (Tensor, Mapping, tuple, list))}


def map_named(function: Callable[[str, Tensor], Any], structure: Any, prefix: str = "") -> Any:
    """The same structure with `function(name, tensor)` for each tensor, under the names of `named_tensors`."""
    if isinstance(structure, Tensor):
        return function(prefix or "0", structure)
    if isinstance(structure, Mapping):
        pairs = {k: map_named(function, v, f"{prefix}-{k}" if prefix else str(k)) for k, v in structure.items()}
        if type(structure) is dict or not isinstance(structure, MutableMapping):
            return pairs
        made = _copy(structure)
        for key, value in pairs.items():
            made[key] = value
            if isinstance(key, str) and getattr(structure, key, None) is structure[key]:  # of a ModelOutput
                object.__setattr__(made, key, value)
        return made
    if isinstance(structure, (tuple, list)):
        items = [map_named(function, v, f"{prefix}-{i}" if prefix else str(i)) for i, v in enumerate(structure)]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    if isinstance(structure, deque):
        return deque((map_named(function, v, f"{prefix}-{i}") for i, v in enumerate(structure)), structure.maxlen)
    inner = map_named(function, held, prefix) if (held := attributes(structure)) else {}
    changed = [key for key in inner if inner[key] is not held[key]]
    made = _copy(structure) if changed else structure
    for key in changed:
        object.__setattr__(made, key, inner[key])  # frozen ones too
    return made


def _copy(structure: Any) -> Any:
    try:
        return copy.copy(structure)
    except TypeError:  # a dict of the user's whose __init__ takes other arguments than copy gives
        kind: Any = type(structure)
        made = kind.__new__(kind)
        made.__dict__.update(structure.__dict__)
        return made


@functools.lru_cache(maxsize=64)
def _argument_names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Positional arguments of `forward`; cached, because inspecting a signature takes longer than a small operator."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind != p.VAR_KEYWORD)


def argument_names(model: nn.Module, count: int) -> list[str]:
    """Names of the first `count` positional arguments of `model.forward`, which the object may have overridden."""
    own = model.__dict__.get("forward")
    names = list(inspect.signature(own).parameters if own is not None else _argument_names(type(model)))  # type: ignore[arg-type]
    return [*names, *(str(i) for i in range(len(names), count))][:count]


def input_tensors(model: nn.Module, inputs: Any) -> list[tuple[str, Tensor]]:
    """Input tensors with the names of `forward`'s arguments (`x`, or `x-0` inside a nested argument).

    Those of a `Frame` are followed by the tensors of its state.
    """
    if isinstance(inputs, Frame):
        return [*input_tensors(model, inputs.inputs), *state_tensors(inputs.state)]
    if isinstance(inputs, Mapping):
        arguments: dict[str, Any] = dict(inputs)
    else:
        values = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        arguments = dict(zip(argument_names(model, len(values)), values, strict=True))
    found = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name, value))
        else:
            found.extend((f"{name}-{inner}", tensor) for inner, tensor in named_tensors(value))
    return found


def cut(inputs: Any, size: int, begin: int, end: int) -> Any:
    """Samples `begin` to `end` of a batch of `size`; tensors without a batch axis stay whole."""
    return tree_map(lambda t: t[begin:end] if isinstance(t, Tensor) and t.ndim and t.shape[0] == size else t, inputs)


def batch_size(inputs: Any) -> int:
    """Number of samples: the first axis of the first tensor."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    return int(tensors[0].shape[0]) if tensors else 1
