"""Computes a digest of any object from its values and its code; it is the same in every process.

An object is taken apart as pickle would do it (`__reduce_ex__`), but nothing is pickled: attributes, slots, arguments
of a partial, items of a container, parameters of a module. Tensors and arrays contribute dtype, shape and bytes;
functions their bytecode, defaults and closure; the user's classes what they define. Values that a `cached_property`
keeps follow from the rest and are left out, so that the digest does not depend on whether they were computed yet.

Parts that cannot be taken apart (a lock, an open file, a handle of another library) are named in `unidentified`.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qflow.core.record import DIGEST_CHARS
from qflow.tasks.sources import belongs_to_user, package_of

DEPTH = 100  # deeper than any structure that is written by hand; a linked list may be nested deeper
PLAIN = (type(None), bool, int, float, complex, str, bytes)
WRAPPERS = (staticmethod, classmethod, property, functools.cached_property)


class ContentDigest:
    """A digest that objects are added to, one after the other."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # holds the objects: Python reuses the id of one that was freed
        self.packages: set[str] = set()
        """Top-level packages of all classes and functions among the objects."""
        self.unidentified: list[str] = []

    @property
    def digest(self) -> str:
        """Digest of everything that was added."""
        return self._sha.hexdigest()[:DIGEST_CHARS]

    def add(self, value: Any, where: str, depth: int = 0) -> None:
        """Add `value`; `where` is its name in messages."""
        if type(value) in PLAIN:
            self._put(type(value).__name__, value)
        elif id(value) in self._seen:
            self._put("again", self._seen[id(value)][0])
        elif depth > DEPTH:
            self.unidentified.append(f"{where} (nested {DEPTH} deep)")
        else:
            self._seen[id(value)] = len(self._seen), value
            self._take(value, where, depth + 1)

    def forget(self) -> None:
        """Release the objects added so far; the digest keeps them, but later objects are not recognized as the same."""
        self._seen.clear()

    def _take(self, value: Any, where: str, depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensor(value, where)
        elif isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
            self._put("array", value.dtype.str, value.shape)
            self._sha.update(value.tobytes())
        elif isinstance(value, type):
            self._class(value, where, depth)
        elif isinstance(value, FunctionType):
            self._function(value, where, depth)
        elif isinstance(value, CodeType):
            self._put("code", value.co_code, value.co_names, value.co_varnames)
            self._all(value.co_consts, where, depth)
        elif isinstance(value, ModuleType):
            self._put("module", value.__name__)
        elif isinstance(value, WRAPPERS):
            self._put(type(value).__name__)
            inner = (getattr(value, name, None) for name in ("__func__", "fget", "fset", "fdel", "func"))
            self._all(inner, where, depth)
        elif type(value) in (list, tuple):
            self._put(type(value).__name__, len(value))
            self._all(value, where, depth)
        elif type(value) in (dict, MappingProxyType):
            self._put("dict", len(value))
            for key, item in value.items():
                self.add(key, where, depth)
                self.add(item, f"{where}.{key}", depth)
        elif type(value) in (set, frozenset):
            self._put("set", sorted(self._apart(item, where) for item in value))  # it has no order to rely on
        else:
            self._object(value, where, depth)

    def _put(self, *words: Any) -> None:
        self._sha.update(repr(words).encode(errors="surrogatepass") + b"\n")

    def _all(self, values: Iterable[Any], where: str, depth: int) -> None:
        for value in values:
            self.add(value, where, depth)

    def _apart(self, value: Any, where: str) -> str:
        own = ContentDigest()
        own.add(value, where)
        self.packages |= own.packages
        self.unidentified += own.unidentified
        return own.digest

    def _tensor(self, value: Tensor, where: str) -> None:
        self._put("tensor", str(value.dtype), tuple(value.shape), str(value.layout))
        try:
            self._sha.update(bytes_of(value.to_dense()))
        except (RuntimeError, NotImplementedError):  # without values (meta), or quantized
            self.unidentified.append(f"{where} ({type(value).__name__} of {value.dtype})")

    def _class(self, value: type, where: str, depth: int) -> None:
        self._put("class", value.__module__, value.__qualname__)
        self.packages.add(package_of(value.__module__))
        if not belongs_to_user(value.__module__):
            return
        self._all(value.__bases__, where, depth)
        for name, part in vars(value).items():
            special = name.startswith("__") and not isinstance(part, (FunctionType, *WRAPPERS))
            if not special and name != "_abc_impl":  # Python adds these: documentation, slots, caches of abc
                self._put(name)
                self.add(part, f"{where}.{name}", depth)

    def _function(self, value: FunctionType, where: str, depth: int) -> None:
        self._put("function", value.__module__, value.__qualname__)
        self.packages.add(package_of(value.__module__))
        self._all((value.__defaults__, value.__kwdefaults__, vars(value)), where, depth)
        self._all(_contents(value), where, depth)
        if belongs_to_user(value.__module__):
            self.add(value.__code__, where, depth)
            if not getattr(sys.modules.get(value.__module__), "__file__", None):  # a notebook has no file to hash
                used = (value.__globals__.get(name) for name in _names(value.__code__))
                self._all((v for v in used if isinstance(v, (FunctionType, type, *PLAIN))), where, depth)

    def _object(self, value: Any, where: str, depth: int) -> None:
        inner = getattr(value, "__wrapped__", None)
        if isinstance(inner, FunctionType):  # a function behind lru_cache
            self.add(inner, where, depth)
            return
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception:  # the object's own code may raise anything: it cannot be taken apart
            self.unidentified.append(f"{where} ({type(value).__name__})")
            return
        if isinstance(parts, str):
            self._put("global", getattr(value, "__module__", ""), parts)
            return
        make, arguments, state, items, pairs = (*parts, None, None, None)[:5]
        if isinstance(state, dict):
            kept = {k for k in state if isinstance(getattr(type(value), str(k), None), functools.cached_property)}
            state = {k: v for k, v in state.items() if k not in kept}
        self._put("object", type(value).__qualname__)
        self._all((make, arguments), where, depth)
        self.add(state, where, depth)
        self._all((list(items or ()), list(pairs or ())), where, depth)


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor for a hash, without a copy if it is contiguous on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _contents(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            yield "empty"


def _names(code: CodeType) -> Iterator[str]:
    """Global names that a function and the functions within it may read."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
