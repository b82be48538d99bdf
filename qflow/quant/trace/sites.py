"""Call sites: the line of the user's code that an operator is called from, relative to its function.

A functional goes by scope and function (`head[mul]`, `head[mul](1)`, counted while tracing). Counted again at run time,
an operator that runs only in training or at one resolution would shift the names of all that follow. So a run finds
the name by scope, function, call site and the how-manieth call at that site; a site that tracing did not see shifts
nothing. Compiled code has no frames to look at: there names are counted.
"""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

Site = tuple[str, int]
"""Function of the user's code, and the line within it."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ENGINE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # qflow/quant, whatever its package
_ENTRIES = frozenset({"observed", "run_model"})  # what is called from above these is the caller's, not the model's
_USER, _OTHERS, _OURS = range(3)
_KINDS: dict[str, int] = {}
_QUALIFIED = sys.version_info >= (3, 11)


def _kind(file: str) -> int:
    kind = _OURS if file.startswith(_ENGINE) else _OTHERS if file.startswith(_TORCH) else _USER
    _KINDS[file] = kind
    return kind


def _user_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside torch and the engine; None where the model itself is all torch's."""
    known = _KINDS.get  # a dozen frames lie between an operator and the user where torch's modules nest
    while frame is not None:
        code = frame.f_code
        kind = known(code.co_filename)
        if kind is None:
            kind = _kind(code.co_filename)
        if kind != _OTHERS and (kind == _USER or code.co_name in _ENTRIES):
            return frame if kind == _USER else None
        frame = frame.f_back
    return None


def call_site() -> Site:
    """Where the user's code is; ("", 0) if only torch's code runs (a model that is an nn.Sequential)."""
    frame = _user_frame(sys._getframe(1))
    if frame is None:
        return "", 0
    code = frame.f_code
    name: str = code.co_qualname if _QUALIFIED else code.co_name  # type: ignore[attr-defined, unused-ignore]
    return name, frame.f_lineno - code.co_firstlineno


def user_line() -> str:
    """` at file.py:12` for a message; empty if only torch's code runs."""
    frame = _user_frame(sys._getframe(1))
    return f" at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""
