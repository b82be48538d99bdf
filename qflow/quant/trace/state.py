"""Temporal state: attributes of a model that a call reads as the last call left them (`cached_attrs` in the plugin).

A `Frame` holds the inputs of a call together with the state before it. Running a model on a frame is a function of the
frame: the state is put into the attributes, the model runs, and the attributes get back what they held. So whatever
runs a model on inputs (tracing, captures, bad cases, layers, sensitivity) runs it on frames too, from the state as it
was. Called with plain inputs, a model keeps its state as its own code does.

The tensors of the state are named after their attributes, `self.state` or `self.head.queue-0`.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_map

from qflow.core.errors import ModelError

PREFIX = "self."
"""Before the names of state tensors: no argument of `forward` is called so."""

State = dict[str, Any]
"""Attribute path -> its value: a tensor, a list, tuple, deque or dict that may hold tensors, None, a number."""


@dataclass
class Frame:
    """Model inputs and the state before the call. It is a pytree: `tree_map` reaches the tensors of both."""

    inputs: Any
    state: State
    outputs: tuple[tuple[str, str], ...] | None = None
    """State tensors that count as outputs of the call: name after the call, name as an output. None: all, as named."""


@dataclass(frozen=True)
class FrameOutputs:
    """The outputs of a call on a frame, the state tensors that count as outputs, and the state after the call."""

    outputs: Any
    tensors: tuple[tuple[str, Tensor], ...]
    after: State


register_pytree_node(
    Frame,
    lambda frame: ([frame.inputs, frame.state], frame.outputs),
    lambda children, outputs: Frame(*children, outputs),  # type: ignore[arg-type, call-arg, misc]
)


@dataclass(frozen=True)
class CachedState:
    """Which attributes hold the state of a model, and their values at the start of a sequence."""

    attrs: tuple[str, ...]
    initial: State

    def reset(self, model: nn.Module) -> None:
        """Put the values at the start of a sequence into the attributes of a float or prepared model."""
        put_state(model, self.start(model))

    def start(self, model: nn.Module) -> State:
        """A copy of the values at the start of a sequence, on the device of the model."""
        place = next((p.device for p in model.parameters()), None)
        found: State = tree_map(
            lambda v: v.to(place) if isinstance(v, Tensor) and place is not None else v, copied_state(self.initial)
        )
        return found

    def restored(self, state: State) -> State:
        """A state that was saved in builtin types, with the types that the attributes have at the start."""
        return {
            path: deque(value, start.maxlen) if isinstance(start := self.initial[path], deque) else value
            for path, value in state.items()
        }


def cached_state(model: nn.Module, attrs: str | Iterable[str]) -> CachedState | None:
    """The state in `attrs` (paths such as `head.memory`) as it is now; None without attributes. Raises ModelError."""
    paths = tuple(dict.fromkeys([attrs] if isinstance(attrs, str) else attrs))
    for path in paths:
        if not isinstance(path, str) or not _holds(model, path):
            raise ModelError(
                f"cached_attrs names attributes of the model, as head.memory, but got {path!r}. Set it in __init__, "
                "to None if there is no state yet."
            )
        if isinstance(_at(model, path), (nn.Module, nn.Parameter)):
            raise ModelError(
                f"cached_attrs names attributes that hold state, but got the {type(_at(model, path)).__name__} {path}. "
                "Name the attribute in it that a call changes."
            )
    return CachedState(paths, copied_state(state_of(model, paths))) if paths else None


def state_of(model: nn.Module, paths: Sequence[str]) -> State:
    """The values of these attributes of a float or prepared model, themselves and not copies."""
    owner = owner_of(model)
    return {path: _at(owner, path) for path in paths}


def put_state(model: nn.Module, state: State) -> None:
    """Set the attributes of a float or prepared model to these values themselves."""
    owner = owner_of(model)
    for path, value in state.items():
        place, _, name = path.rpartition(".")
        setattr(_at(owner, place), name, value)


def copied_state(state: Any) -> Any:
    """A copy without gradients."""
    if state is None or type(state) in (bool, int, float, str):
        return state  # nearly all attributes of modules, and torch's tree functions take ten times as long for one
    return tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v), state)


def without(state: State, modules: Collection[str]) -> State:
    """The state outside of these modules: that of a skipped module is its own, and not part of the graph."""
    return {path: v for path, v in state.items() if not any(path.startswith(f"{module}.") for module in modules)}


def owner_of(model: nn.Module) -> nn.Module:
    """The module whose attributes hold the state: of a prepared model, its copy of the float model."""
    owner: nn.Module = getattr(model, "qflow_state_owner", model)
    return owner


def _at(owner: Any, path: str) -> Any:
    for name in path.split(".") if path else ():
        owner = getattr(owner, name)
    return owner


def _holds(model: nn.Module, path: str) -> bool:
    try:
        _at(model, path)
    except AttributeError:
        return False
    return bool(path)
