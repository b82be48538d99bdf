"""Views of captured tensors: by which calls a tensor is a part of another, and what a write to one does to the others.

A replay computes values that nothing overwrites. So a write that other tensors see becomes an operator of its own,
`rewritten`: it takes the whole tensor before the write and the written values, and gives the tensor and its views anew.
It calls again what made the view, so the strides in memory do not matter. While capturing, each such chain of calls is
checked: from the whole tensor it has to lead to the very memory of the view.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qflow.quant.trace.aliases import Aliases, storage
from qflow.quant.trace.tape import Call, Ref, references, tensors_in

Step = tuple[Any, tuple[Any, ...], dict[str, Any], int]
"""A call that makes a view: function, args and kwargs with VIEWED in them, and which of its results is the view."""
Path = tuple[Step, ...]


class _Viewed:
    """Stands in a step for the tensor that is viewed."""


VIEWED = _Viewed()
_BY_STRIDES = frozenset(["as_strided", "as_strided_", "set_"])


@dataclass(frozen=True)
class _Node:
    """A tensor as a view of its parent; without a parent it is no view, as far as tracing sees."""

    parent: _Node | None = None
    step: Step | None = None


class Views(Aliases):
    """The live tensors of a capture by their memory, and how they were made from each other."""

    def __init__(self) -> None:
        super().__init__()
        self._nodes: dict[int, tuple[weakref.ref[Tensor], _Node]] = {}
        self._call: Call | None = None
        self._module: nn.Module | None = None
        self._given: list[tuple[int | None, _Node]] = []
        self._results: dict[int, int] = {}

    def called(self, call: Call, module: nn.Module | None, tensors: Sequence[Tensor]) -> None:
        """Take note of the call that gives the next tensors. `tensors` are its arguments, none if it has no paths."""
        self._call, self._module, self._results = call, module, {}
        self._given = [(storage(t), self._node(t)) for t in tensors]

    def add(self, tensor: Tensor) -> None:
        """As in Aliases; an unknown tensor is the next result of the last call."""
        super().add(tensor)
        position = self._results.setdefault(id(tensor), len(self._results))
        if self._known(tensor) is None:
            self._nodes[id(tensor)] = weakref.ref(tensor), self._made(tensor, position)

    def path(self, base: Tensor, view: Tensor) -> Path | None:
        """The steps from `base` to `view`; None if they are not known, or do not lead to the memory of `view`."""
        steps: list[Step] = []
        top, node = self._node(base), self._node(view)
        while node is not top:
            if node.parent is None or node.step is None:
                return None
            steps.append(node.step)
            node = node.parent
        found = tuple(reversed(steps))
        try:
            return found if _place(followed(found, base)) == _place(view) else None
        except RuntimeError:  # the shape of one of them has been changed in place
            return None

    def _made(self, tensor: Tensor, position: int) -> _Node:
        key = storage(tensor)
        for slot, (given, node) in enumerate(self._given):
            if key is not None and given == key and self._call is not None:
                return _Node(node, _step(self._call, self._module, slot, position))
        return _Node()

    def _known(self, tensor: Tensor) -> _Node | None:
        reference, node = self._nodes.get(id(tensor), (None, None))
        return node if reference is not None and reference() is tensor else None

    def _node(self, tensor: Tensor) -> _Node:
        known = self._known(tensor)
        if known is None:
            known = _Node()
            self._nodes[id(tensor)] = weakref.ref(tensor), known
        return known


def _step(call: Call, module: nn.Module | None, slot: int, position: int) -> Step | None:
    """The step of `call`, whose `slot`-th tensor is viewed; None if it reads other operators or goes by strides."""
    if getattr(call.function, "__name__", "") in _BY_STRIDES:
        return None
    places = iter(range(slot + 1))

    def replaced(value: Any) -> Any:
        return VIEWED if isinstance(value, (Ref, Tensor)) and next(places, None) == slot else value

    args, kwargs = tree_map(replaced, (call.args, call.kwargs))
    if references((args, kwargs)):
        return None
    if module is not None:
        return type(module).forward, (module, *args), kwargs, position
    return call.function, args, kwargs, position


def followed(path: Path, base: Tensor) -> Tensor:
    """The view of `base` to which `path` leads."""
    for function, args, kwargs, position in path:
        args, kwargs = tree_map(lambda v, base=base: base if v is VIEWED else v, (args, kwargs))
        base = tensors_in(function(*args, **kwargs))[position]
    return base


def rewritten(base: Tensor, value: Tensor, path: Path, wanted: Sequence[Path]) -> tuple[Tensor, ...]:
    """The views `wanted` of `base` after `value` was written where `path` leads; `base` itself is left alone.

    Raises RuntimeError if a step copies, as `reshape` does for a tensor that lies otherwise in memory.
    """
    whole = base.clone()
    part = followed(path, whole)
    if storage(part) != storage(whole):
        raise RuntimeError("a view of a tensor that lies otherwise in memory is a copy")
    part.copy_(value)
    return tuple(followed(one, whole) for one in wanted)


def seen_anew(written: Tensor, wanted: Sequence[Path]) -> tuple[Tensor, ...]:
    """The views `wanted` of a tensor that was `written` as a whole."""
    return tuple(followed(one, written) for one in wanted)


def zeroed(base: Tensor, path: Path) -> Tensor:
    """A copy of `base` with zeros where `path` leads."""
    whole = base.clone()
    followed(path, whole).zero_()
    return whole


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies and how it is read: equal for two tensors that are the same view."""
    kind = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (storage(tensor), tensor.storage_offset(), *kind)
