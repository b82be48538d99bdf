"""Modules that can be called: `qflow.check` is a door (`python -m qflow.check`) and a function of the library."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._target()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._target())

    def _target(self) -> Any:
        place, _, name = self.__dict__["__call_target__"].rpartition(".")
        return getattr(importlib.import_module(place), name)


def call_as(module_name: str, target: str) -> None:
    """Make the module callable: a call goes to the function at the dotted name `target`, imported then."""
    module = sys.modules[module_name]
    module.__dict__["__call_target__"] = target
    module.__class__ = _Callable
