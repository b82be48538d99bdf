"""Scales of a model that the plugin calibrated, from its state dict.

The quantizer of an output is the submodule `activation_post_process` of its operator and holds its scale as the buffer
`scale`; exactly 1 is the scale of a quantizer that has observed nothing. Scales of weights are not read, because they
follow from the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qflow.imports.records import MOST_NAMES, NOT_READ, Content, Entry, ImportFileError, Unmatched

KIND = "scales of a calibrated model"
OUTPUT = "activation_post_process.scale"
NEVER = "its scale is 1, as of a quantizer that has observed nothing"


def holds_scales(value: object) -> bool:
    """Return whether `value` is a state dict with scales of outputs."""
    return isinstance(value, Mapping) and any(isinstance(key, str) and key.endswith(OUTPUT) for key in value)


def read_scales(state: Mapping[Any, Any], shown: str) -> Content:
    """Return the scales of outputs by operator. Raises ImportFileError for a state dict of more than scales hold."""
    if len(state) > 10 * MOST_NAMES:
        raise ImportFileError(f"A state dict has at most {10 * MOST_NAMES} entries, but got more in {shown}.")
    entries: dict[str, Entry] = {}
    refused: list[Unmatched] = []
    for key, value in state.items():
        if not isinstance(key, str) or not key.endswith(f".{OUTPUT}"):
            continue
        name = key.removesuffix(f".{OUTPUT}")
        if getattr(value, "numel", lambda: 0)() != 1:
            refused.append(Unmatched(NOT_READ, name, "a scale for each channel of its output"))
            continue
        scale = float(value)
        if scale == 1.0:
            refused.append(Unmatched(NOT_READ, name, NEVER))
        elif not 0.0 < scale < math.inf:
            refused.append(Unmatched(NOT_READ, name, f"the scale {scale:g}"))
        else:
            entries[name] = Entry(scale=scale)
    return Content(KIND, entries, refused=tuple(refused))
