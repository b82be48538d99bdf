"""Conversion of records, which are frozen dataclasses, to JSON and back.

`plain` and `from_dict` serve all records. The JSON is strict and canonical: keys are sorted, there are no blanks,
infinity is the string "inf" (the SQNR of two equal tensors), and NaN is refused. Two records with equal digests are
therefore equal.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qflow.core.errors import QflowError

T = TypeVar("T")
_AS_IT_IS = (str, int, bool, type(None))
DIGEST_CHARS = 16  # 64 bits, enough for the few thousand objects of a study


def plain(value: Any, where: str = "value") -> Any:
    """Return `value` as builtins that JSON can hold. Raises QflowError for NaN or a type without a JSON form."""
    if type(value) in _AS_IT_IS or (type(value) is float and math.isfinite(value)):  # most values
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, where) for v in value]
    if isinstance(value, float):
        if math.isnan(value):
            raise QflowError(f"A record holds finite numbers or infinity, but got NaN for {where}.")
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return value
    if value is None or isinstance(value, (str, int, bool)):
        return value
    raise QflowError(f"A record holds plain values, but got {type(value).__name__} for {where}.")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return the canonical JSON of a record or of plain values; with `indent`, the same content indented."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(plain(value), sort_keys=True, indent=indent, separators=separators, allow_nan=False)


def digest(value: Any) -> str:
    """Return the content digest: the first 64 bits of SHA-256 over the canonical JSON."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:DIGEST_CHARS]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
    """Build the record `cls` from the result of `plain`. Raises QflowError for other keys, or values of other types."""
    if not isinstance(data, Mapping):
        raise QflowError(f"{cls.__name__} is built from a mapping, but got {type(data).__name__}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise QflowError(f"{cls.__name__} has the keys {sorted(fields)}, but got {unknown}.")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise QflowError(f"{cls.__name__} needs the keys {missing}, but got {sorted(data)}.")
    return cls(**{name: _checked(f"{cls.__name__}.{name}", hints[name], data[name]) for name in fields if name in data})


def _checked(where: str, hint: Any, value: Any) -> Any:
    try:
        return _convert(hint, value)
    except QflowError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError) as error:
        raise QflowError(f"{where} is as a record holds it, but got {_short(value)}.") from error


def _short(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # an integer of more digits than Python prints
        return type(value).__name__


def _convert(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [kind for kind in args if kind is not type(None)]
        return value if type(value) in kinds else _convert(kinds[0], value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_convert(args[0], v) for v in value)
        return tuple(_convert(a, v) for a, v in zip(args, value, strict=True))
    if origin is list:
        return [_convert(args[0], v) for v in value]
    if origin in (dict, Mapping) or (isinstance(origin, type) and issubclass(origin, Mapping)):
        return {k: _convert(args[1], v) for k, v in value.items()}
    if hint is float and (type(value) is int or value in ("inf", "-inf")):
        return float(value)
    if isinstance(hint, type) and hint in (str, int, bool, float) and type(value) is not hint:
        raise TypeError(f"no {hint.__name__}")
    return value
