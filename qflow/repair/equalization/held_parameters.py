"""The parameters that functionals read (`F.linear(x, self.w)`): which of them may be scaled in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qflow.quant.trace.tape import Op
from qflow.repair.equalization.channel_rules import constants_of

Key = tuple[int, tuple[int, ...], tuple[int, ...]]


class HeldParameters:
    """The parameters of a model, and the operators of one forward pass that read them or views of them."""

    def __init__(self, model: nn.Module, ops: Sequence[Op]) -> None:
        named = list(model.named_parameters(remove_duplicate=False))
        self._names: dict[int, str] = {}
        for name, parameter in named:
            self._names.setdefault(_storage(parameter), name)
        called = {op.module for op in ops if op.module is not None}
        self._of_modules = {
            _storage(parameter)
            for name, parameter in named
            if any(name.rpartition(".")[0] == path or name.startswith(f"{path}.") for path in called)
        }
        self._readers: dict[int, set[tuple[Key, str]]] = {}
        for op in ops:
            for tensor in constants_of(op):
                if _storage(tensor) in self._names:
                    self._readers.setdefault(_storage(tensor), set()).add((self.key(tensor), op.op_type))

    @staticmethod
    def key(tensor: Tensor) -> Key:
        """What identifies a view of a parameter."""
        return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()

    def name(self, tensor: Tensor) -> str | None:
        """The name of the parameter that `tensor` is, or is a view of; None for any other tensor."""
        return self._names.get(_storage(tensor))

    def own(self, tensor: Tensor) -> bool:
        """True for a parameter, or a part of one, that no module and no other kind of operator reads."""
        storage = _storage(tensor)
        if storage not in self._names or storage in self._of_modules:
            return False
        mine = self.key(tensor)
        readers = [(key, kind) for key, kind in self._readers.get(storage, ()) if _overlap(key, mine)]
        return all(key == mine for key, _ in readers) and len({kind for _, kind in readers}) <= 1


def tied(model: nn.Module) -> frozenset[str | None]:
    """Modules whose parameters belong to several modules, or are computed at each access (parametrized)."""
    owners: dict[int, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(path)
    shared = {path for paths in owners.values() if len(paths) > 1 for path in paths}
    computed = {path for path, m in model.named_modules() if hasattr(m, "parametrizations")}
    return frozenset(shared | computed)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _overlap(a: Key, b: Key) -> bool:
    """True if the memory between the first and the last element of two float32 views overlaps (or might)."""
    (first, a_end), (second, b_end) = _span(a), _span(b)
    return first < b_end and second < a_end


def _span(key: Key) -> tuple[int, int]:
    begin, shape, strides = key
    return begin, begin + 4 * (1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)))
