"""Call sites: the line of the user's code that calls an operator, relative to its function.

While tracing, functionals are named by scope, function and a count (`head[mul]`, `head[mul](1)`). If a forward pass
counted the calls too, an operator that runs only in training or at one resolution would shift the names of all that
follow. So a forward pass finds the name by scope, function, call site and the number of the call at that site; a call
site that was not traced shifts no name. Of a function that qflow writes out (decompose.py), the line there is part of
the site, because attention has other parts where query and key are one tensor. Compiled code has no frames, so there
calls are counted.
"""

from __future__ import annotations

import os
import sys
from types import FrameType

import torch

Site = tuple[str, int]
"""Function of the user's code (and the part of a function that qflow writes out), and the line within it."""

_TORCH = os.path.dirname(torch.__file__) + os.sep
_ENGINE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep  # the folder qflow/quant
_ENTRIES = frozenset({"observed", "run_model"})  # frames above these belong to the caller, not to the model
_WRITTEN_OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "decompose.py")
_BY_USER, _BY_TORCH, _BY_ENGINE, _BY_PART = range(4)
_KINDS: dict[str, int] = {}
_QUALIFIED = sys.version_info >= (3, 11)


def _kind(file: str) -> int:
    kind = _BY_ENGINE if file.startswith(_ENGINE) else _BY_TORCH if file.startswith(_TORCH) else _BY_USER
    kind = _BY_PART if file == _WRITTEN_OUT else kind
    _KINDS[file] = kind
    return kind


def _user_frame(frame: FrameType | None) -> tuple[FrameType | None, FrameType | None]:
    """The innermost frame outside torch and qflow/quant, and the innermost one of a function that is written out.

    The first is None if the whole model is torch code.
    """
    known = _KINDS.get  # cached: nested torch modules put a dozen frames between an operator and the user's code
    part: FrameType | None = None
    while frame is not None:
        code = frame.f_code
        kind = known(code.co_filename)
        if kind is None:
            kind = _kind(code.co_filename)
        if kind == _BY_PART:
            part = part or frame
        elif kind != _BY_TORCH and (kind == _BY_USER or code.co_name in _ENTRIES):
            return frame if kind == _BY_USER else None, part
        frame = frame.f_back
    return None, part


def call_site() -> Site:
    """The current call site; ("", 0) if only torch code runs (a model that is an nn.Sequential)."""
    frame, part = _user_frame(sys._getframe(1))
    within = "" if part is None else f" {part.f_lineno}"
    if frame is None:
        return within, 0
    code = frame.f_code
    name: str = code.co_qualname if _QUALIFIED else code.co_name  # type: ignore[attr-defined, unused-ignore]
    return name + within, frame.f_lineno - code.co_firstlineno


def user_line() -> str:
    """` at file.py:12` for a message; "" if only torch code runs."""
    frame, _ = _user_frame(sys._getframe(1))
    return f" at {os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}" if frame is not None else ""
