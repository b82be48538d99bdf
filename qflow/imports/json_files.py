"""JSON files: a qconfig of qflow (qconfig.json, qflow.json), and a quant_config of HMCT with its comments."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from qflow.core.dtype import QDtype
from qflow.core.errors import QflowError
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.record import from_dict
from qflow.imports.dtypes import parse_dtype
from qflow.imports.records import MOST_NAMES, NOT_HAD, NOT_READ, Content, Entry, ImportFileError, Unmatched

QFLOW, HMCT = "qconfig of qflow", "quant_config of HMCT"
LEVELS = ("model_config", "op_config", "node_config", "subgraph_config")
INPUTS = {"qtype": "qtype", "InputType": "qtype", "input0": "input0", "InputType0": "input0", "input1": "input1",
          "InputType1": "input1", "OutputType": "OutputType"}  # fmt: skip
"""Keys of a node -> the one of them that is used here (older releases have other names)."""
_COMMENT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\Z)|//[^\n]*|/\*.*?(?:\*/|\Z)', re.DOTALL)
"""A text, which is kept, or a comment; also one without an end, so that no character is looked at twice."""


def parse_json(text: str, shown: str) -> Any:
    """Return the value of strict JSON with comments. Raises ImportFileError for anything else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    plain = _COMMENT.sub(lambda m: m.group() if m.group().startswith('"') else " ", text)
    try:
        return json.loads(plain, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        words = "nesting too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:80]
        raise ImportFileError(f"A .json file holds JSON, but got {shown}: {words}. Correct it.") from error


def read_json_file(text: str, shown: str) -> Content:
    """Return what a qconfig of qflow or a quant_config of HMCT says. Raises ImportFileError for another file."""
    value = parse_json(text, shown)
    if isinstance(value, Mapping) and any(level in value for level in LEVELS):
        return _hmct(value, shown)
    return _qflow(value, shown)


def _qflow(value: Any, shown: str) -> Content:
    """Return a qconfig as qflow writes it; `qflow.json` of an export holds the scales too."""
    rule = "A .json file holds a qconfig that qflow wrote, or a quant_config of HMCT"
    try:
        nested = isinstance(value.get("applied"), Mapping)
        found = from_dict(QConfig, value["applied"] if nested else value)
        scales = value["quantizers"]["scales"][0] if nested else {}
        entries = {name: _of(op, _scale(scales.get(name))) for name, op in found.ops.items()}
    except (QflowError, LookupError, TypeError, ValueError, AttributeError) as error:
        why = "no mapping" if isinstance(error, AttributeError) else " ".join(str(error).split())[:120]
        raise ImportFileError(f"{rule}, but got {shown}: {why}. Take another.") from error
    return Content(QFLOW, entries, own_names=True)


def _of(op: OpQConfig, scale: float | None) -> Entry:
    integer = op.output is not None and op.output.is_integer
    return Entry(
        op.output, op.output is None, op.weight, op.input or (), (op.pinned_scale() or scale) if integer else None
    )


def _scale(value: Any) -> float | None:
    """Return the scale of an output as `qflow.json` holds it: a number, or a list of one."""
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return float(found) if number and 0.0 < found < math.inf else None


def _hmct(value: Mapping[str, Any], shown: str) -> Content:
    """Return the dtypes of nodes by name and by type, in HMCT's own terms: those of INPUTS."""
    rule = f"A quant_config holds {', '.join(LEVELS)}"
    if odd := [key for key in value if key not in LEVELS]:
        raise ImportFileError(f"{rule}, but got {odd[0]!a:.40} in {shown}. Correct it.")
    if any(not isinstance(level, Mapping) or len(level) > MOST_NAMES for level in value.values()):
        raise ImportFileError(f"{rule}, each a mapping, but got another value in {shown}. Correct it.")
    refused: list[Unmatched] = []
    nodes = _levels(value.get("node_config", {}), refused, rule, shown)
    types = _levels(value.get("op_config", {}), refused, rule, shown)
    refused += [Unmatched(NOT_READ, name, "a subgraph") for name in value.get("subgraph_config", {})]
    model = value.get("model_config", {})
    default = parse_dtype(model.get("all_node_type", "int8"))
    if not isinstance(default, QDtype):
        raise ImportFileError(f"all_node_type is int8, int16 or float16, but got {default!a:.40} in {shown}.")
    output = model.get("model_output_type")
    refused += [Unmatched(NOT_READ, "model_output_type", "qflow decides by the operator")] if output else []
    return Content(HMCT, refused=tuple(refused), node_config=nodes, node_default=default, op_config=types)


def _levels(level: Mapping[str, Any], refused: list[Unmatched], rule: str, shown: str) -> dict[str, dict[str, QDtype]]:
    found: dict[str, dict[str, QDtype]] = {}
    for name, keys in level.items():
        if not isinstance(keys, Mapping) or len(keys) > len(INPUTS) + 1:
            raise ImportFileError(f"{rule}, each name with its keys, but got another value of {name:.60} in {shown}.")
        for key, text in keys.items():
            dtype = parse_dtype(text) if key in INPUTS and isinstance(text, str) else f"{text}"[:40]
            if key == "ON":
                refused.append(Unmatched(NOT_READ, name, "where it runs (ON)"))
            elif key in INPUTS and isinstance(dtype, QDtype):
                found.setdefault(name, {})[INPUTS[key]] = dtype
            else:
                refused.append(Unmatched(NOT_HAD, name, f"{key:.40} {dtype}, which qflow does not have"))
    return found
