"""`qconfig_dtypes.pt` of the plugin from OpenExplorer 3.5 on, and dtypes as the plugin's files write them.

The schema of the file is not published; it is said to hold the dtypes of input, weight and output for each module. It
is read in the forms that ModuleNameTemplate takes for the same: a dtype (of the output), or a mapping with `dtype` and
`threshold`, or with `input`, `weight` and `output`; a list of inputs goes by position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qflow.core.dtype import QDtype
from qflow.imports.records import MOST_NAMES, NOT_HAD, Content, Entry, ImportFileError, Unmatched

KIND = "dtypes of the plugin"
KEYS = frozenset({"dtype", "threshold", "input", "weight", "output"})
FLOATS = ("float32", "float", "qint32", "int32")
"""What an output without a quantizer is called: the accumulator of a GEMM."""
NOTHING = ("", "None", "none", "null", "unknown", "-")
MOST_INPUTS = 64
SHAPE = "qconfig_dtypes.pt maps module names to dtypes"


def parse_dtype(value: object) -> QDtype | str | None:
    """Return a dtype from its name or its torch dtype; None for none, `float32` for an output that is not quantized.

    A dtype that qflow does not have comes back as its text.
    """
    if value is None:
        return None
    text = re.sub(r"^torch\.", "", str(value)[:40].strip())
    if text in NOTHING:
        return None
    if text in FLOATS:
        return QDtype.float32
    name = f"q{text}" if text in ("int8", "int16") else text
    return QDtype(name) if name in QDtype.__members__ else text


def read_dtypes(value: Mapping[Any, Any], shown: str) -> Content:
    """Return the entries of the mapping in the file. Raises ImportFileError for other values."""
    if len(value) > MOST_NAMES:
        raise ImportFileError(f"{SHAPE}, but got {len(value)} names in {shown}. Name another file.")
    entries: dict[str, Entry] = {}
    refused: list[Unmatched] = []
    for name, item in value.items():
        if not isinstance(name, str):
            raise ImportFileError(f"{SHAPE}, but got {name!a:.40} as a name in {shown}. Name another file.")
        entries[name] = _entry(item, name, shown, refused)
    return Content(KIND, {name: entry for name, entry in entries.items() if entry.says}, refused=tuple(refused))


def _entry(item: Any, name: str, shown: str, refused: list[Unmatched]) -> Entry:
    parts = item if isinstance(item, Mapping) else {"output": item}
    if odd := [key for key in parts if key not in KEYS]:
        raise ImportFileError(
            f"{SHAPE}: input, weight and output, but got {odd[0]!a:.40} of {name:.80} in {shown}. Name another file."
        )
    output = _single(parts.get("dtype") if parts.get("output") is None else parts["output"])
    listed = parts.get("input")
    inputs = [_single(i) for i in listed[:MOST_INPUTS]] if isinstance(listed, (list, tuple)) else [_single(listed)]
    return entry_of(name, output, _single(parts.get("weight")), inputs, _scale(parts.get("threshold"), output), refused)


def entry_of(
    name: str,
    output: QDtype | str | None,
    weight: QDtype | str | None = None,
    inputs: list[QDtype | str | None] | None = None,
    scale: float | None = None,
    refused: list[Unmatched] | None = None,
) -> Entry:
    """Return an entry; dtypes that qflow does not have are added to `refused`.

    A weight in float is left out. A float32 input is that of an operator that is not quantized, and says nothing.
    """
    known = []
    for what, dtype in (
        ("output", output),
        ("weight", weight),
        *((f"input {i}", d) for i, d in enumerate(inputs or [])),
    ):
        if isinstance(dtype, QDtype) or dtype is None:
            known.append(dtype)
        else:
            known.append(None)
            if refused is not None:
                refused.append(Unmatched(NOT_HAD, name, f"{what} {dtype}, a dtype that qflow does not have"))
    out, own, *read = known
    return Entry(
        output=None if out == QDtype.float32 else out,
        high_precision=out == QDtype.float32,
        weight=None if own == QDtype.float32 else own,
        inputs=tuple(None if d == QDtype.float32 else d for d in read),
        scale=scale,
    )


def _single(value: Any) -> QDtype | str | None:
    if isinstance(value, (list, tuple)):
        value = value[0] if len(value) == 1 else None
    if isinstance(value, Mapping):
        return _single(value.get("dtype"))
    return parse_dtype(value)


def _scale(threshold: Any, output: QDtype | str | None) -> float | None:
    """Return the scale that a threshold fixes: threshold / 128 at qint8, / 32768 at qint16."""
    if isinstance(threshold, Mapping):
        threshold = threshold.get("output")
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        return None
    if not isinstance(output, QDtype) or not output.is_integer or not 0.0 < threshold < math.inf:
        return None
    return float(threshold) / -output.qmin
