"""The parser of what a user writes for one operator; it returns fields of an OpQConfig.

Forms:
    qint16                output dtype; weights stay qint8
    qint8/qint16          output and weight dtype
    qint8@0.05            output with a fixed scale
    qint16@0..200         output with a known range, low..high: the scale follows as max(|low|, |high|) / -qmin
    {output: qint16, ...} any field of OpQConfig by name; without `output` the next rule decides the output dtype,
                          and `output: null` asks for a high-precision output
    OpQConfig(...)        its fields
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields as record_fields
from typing import Any

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import OpNode
from qflow.core.nearest import did_you_mean
from qflow.core.qconfig import METHODS, OpQConfig

KEYS = ("output", "weight", "input", "observer", "fixed_scale", "known_range", "frozen", "weight_axis")
FORMS = "Write qint16, qint8/qint16, qint8@0.05, qint16@0..200, or a mapping with output, weight, input, ..."


def parse_op(value: object, where: str) -> dict[str, Any]:
    """Return the fields of an OpQConfig from one of the forms above. Raises ConfigError that starts with `where`."""
    if isinstance(value, OpQConfig):
        value = {f.name: getattr(value, f.name) for f in record_fields(value) if f.name in KEYS}
    if isinstance(value, Mapping):
        found = _mapping(value, where)
    elif isinstance(value, str):
        found = _text(value, where)
    else:
        raise ConfigError(f"{where} is a text, a mapping or an OpQConfig, but got {value!r}. {FORMS}")
    check_op(found, where)
    return found


def _text(text: str, where: str) -> dict[str, Any]:
    head, _, weight = text.partition("/")
    output, _, at = head.partition("@")
    found: dict[str, Any] = {"output": QDtype.parse(output, where)}
    if weight:
        if "@" in weight:
            raise ConfigError(f"{where}: a scale or range follows the output dtype, but got {text!r}. {FORMS}")
        found["weight"] = QDtype.parse(weight, where)
    if ".." in at:
        found["known_range"] = parse_range(at, where)
    elif at:
        found["fixed_scale"] = _scale(at, where)
    return found


def _mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    unknown = [str(key) for key in value if key not in KEYS]
    if unknown:
        raise ConfigError(f"{where} has the keys {', '.join(KEYS)}, but got {', '.join(unknown)}. Remove it.")
    readers = {
        "output": QDtype.parse,
        "weight": QDtype.parse,
        "input": _inputs,
        "observer": _observer,
        "fixed_scale": _scale,
        "known_range": parse_range,
        "frozen": _flag,
        "weight_axis": _axis,
    }
    found: dict[str, Any] = {k: readers[k](v, f"{where}.{k}") for k, v in value.items() if v is not None}
    if "output" in value:
        found.setdefault("output", None)
    return found


def check_op(op: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError for fields that contradict each other."""
    output = op.get("output")
    if op.get("fixed_scale") is not None and op.get("known_range") is not None:
        raise ConfigError(f"{where} takes a fixed scale or a known range, but got both. Keep one.")
    for key in ("fixed_scale", "known_range"):
        if op.get(key) is not None and "output" in op and not (output and output.is_integer):
            raise ConfigError(f"{where}: {key} is for an integer output, but got {output}. Use qint8 or qint16.")
    if op.get("observer") == "kl" and output == QDtype.qint16:
        raise ConfigError(
            f"{where}: the observer kl is for qint8, but got qint16: its 32768 levels exceed the histogram's bins, so "
            "the divergence says nothing. Use minmax or mse."
        )


def parse_range(value: object, where: str) -> tuple[float, float]:
    """Return a known range from `low..high` or a pair. Raises ConfigError unless both are finite and low < high."""
    parts: Sequence[object] = ()
    if isinstance(value, str):
        parts = value.partition("..")[::2]
    elif isinstance(value, Sequence):
        parts = value
    bounds = [_number(part) for part in parts]
    if len(bounds) != 2 or not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ConfigError(f"{where}: a known range is low..high, two ordered numbers, but got {value!r}. Write 0..200.")
    return bounds[0], bounds[1]


def parse_observer(value: object, where: str) -> str | None:
    """Return a calibration method from its name or from an observer class of that name (`MSEObserver`, `min_max`).

    HistogramObserver names no method, so it gives None, which means the trial's method. Raises ConfigError.
    """
    text = str(getattr(value, "__name__", value)).removesuffix("Observer")
    name = text.lower().removeprefix("movingaverage").removeprefix("perchannel").replace("min_max", "minmax")
    name = {"clipstd": "clip_std"}.get(name, name)
    if name == "histogram":
        return None
    if name not in METHODS:
        raise ConfigError(f"{where} is one of {', '.join(METHODS)}, but got {text!r}.{did_you_mean(text, METHODS)}")
    return name


def inputs_by_position(op: OpQConfig, node: OpNode) -> tuple[QDtype | None, ...] | None:
    """Return `op.input` with one entry per input of `node`; a single entry holds for all. Raises ConfigError."""
    if op.input is None:
        return None
    count = len(node.inputs)
    asked = op.input * count if len(op.input) == 1 else op.input
    if len(asked) > count and count and any(asked[count:]):
        raise ConfigError(
            f"Input dtypes go by position, but got {len(asked)} for {node.name}, which reads {count}. "
            "Give one for all, or one each with null where the producer's holds."
        )
    padded = (*asked, *[None] * count)[:count]
    return padded if any(padded) else None


def _inputs(value: object, where: str) -> tuple[QDtype | None, ...]:
    entries = value if isinstance(value, (list, tuple)) else [value]
    return tuple(None if e is None else QDtype.parse(e, where) for e in entries)


def _observer(value: object, where: str) -> str | None:
    return parse_observer(value, where)


def _scale(value: object, where: str) -> float:
    number = _number(value)
    if not 0.0 < number < math.inf:
        raise ConfigError(f"{where}: a fixed scale is a number above 0, but got {value!r}. Write qint8@0.05.")
    return number


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} is true or false, but got {value!r}. True keeps the calibrated scale in QAT.")
    return value


def _axis(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < -1:
        raise ConfigError(f"{where} is an axis of the weight, or -1 for one scale, but got {value!r}.")
    return value


def _number(value: object) -> float:
    """Return `value` as a float, or NaN if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
