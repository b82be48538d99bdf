"""Files of `qflow.export`: `qconfig_j6m.py` of both generations of the plugin, `names.csv` and `nodes.csv`.

The module is parsed, not run: only its two tables are read, and they hold names, numbers and dtypes.
"""

from __future__ import annotations

import ast
import csv
import io
from dataclasses import replace
from typing import Any

from qflow.core.dtype import QDtype
from qflow.imports.dtypes import read_dtypes
from qflow.imports.records import MOST_NAMES, Content, Entry, ImportFileError

MODULE, NAMES, NODES = "exported mix", "names of the plugin", "nodes of the ONNX graph"
LARGEST = 4 << 20  # characters; the syntax tree takes a hundred times as much
RULE = "A .py file is a qconfig_j6m.py that qflow exported"


def read_module(text: str, shown: str) -> Content:
    """Return the tables of an exported module. Raises ImportFileError for another file."""
    try:
        if len(text) > LARGEST:
            raise ValueError(f"{len(text)} characters")
        tables = {
            node.targets[0].id: _value(node.value)
            for node in ast.parse(text).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id in ("OPERATORS", "OUTPUTS", "PORTS")
        }  # fmt: skip
        if "OPERATORS" in tables:
            entries = {str(name): _operator(dict(item)) for name, item in tables["OPERATORS"].items()}
            return Content(MODULE, entries, own_names=True)
        if "OUTPUTS" in tables:
            return _templates(tables["OUTPUTS"], tables.get("PORTS", {}), shown)
        raise ValueError("no OPERATORS and no OUTPUTS")
    except ImportFileError:
        raise
    except (SyntaxError, ValueError, TypeError, LookupError, AttributeError, RecursionError, MemoryError) as error:
        words = " ".join(str(error).split())[:100] or type(error).__name__
        raise ImportFileError(f"{RULE}, but got {shown}: {words}. Export it again.") from error


def _value(node: ast.expr) -> Any:
    """Return a literal in which the names of dtypes and `dict(...)` are allowed. Raises ValueError for another one."""
    if isinstance(node, ast.Name) and node.id in QDtype.__members__:
        return QDtype(node.id)
    if isinstance(node, ast.Dict):
        keys = [None if key is None else _value(key) for key in node.keys]
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, (ast.Tuple, ast.List)):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(word.arg): _value(word.value) for word in node.keywords}
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return node.value
    raise ValueError(f"line {node.lineno} is no plain value")


def _operator(item: dict[str, Any]) -> Entry:
    at = {int(i): _pair(pair) for i, pair in dict(item.get("inputs") or {}).items()}
    if any(not 0 <= i < 64 for i in at):
        raise ValueError("a position beyond 64 inputs")
    output, weight, scale = item["output"], item.get("weight"), item.get("scale")
    if not all(isinstance(d, (QDtype, type(None))) for d in (output, weight)):
        raise ValueError("a dtype that is none")
    return Entry(
        output,
        output is None,
        weight,
        tuple(at.get(i) for i in range(max(at) + 1)) if at else (),
        None if scale is None else float(scale),
    )


def _pair(pair: Any) -> QDtype:
    dtype, _ = pair
    return QDtype(dtype)


def _templates(outputs: dict[Any, Any], ports: dict[Any, Any], shown: str) -> Content:
    """Return the tables of plugin35."""
    found = read_dtypes({n: {**outputs.get(n, {}), **ports.get(n, {})} for n in {**outputs, **ports}}, shown)
    return replace(found, kind=MODULE, own_names=True)


def read_csv(text: str, shown: str) -> Content:
    """Return names.csv or nodes.csv of an export. Raises ImportFileError for another table."""
    rule = "A .csv file is names.csv or nodes.csv of an export"
    try:
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except (csv.Error, ValueError) as error:
        raise ImportFileError(f"{rule}, but got {shown}: {str(error)[:80]}. Export it again.") from error
    columns = set(rows[0]) if rows else set()
    whole = all(None not in row and None not in row.values() for row in rows)
    if len(rows) > MOST_NAMES or not whole:
        raise ImportFileError(f"{rule}, but got {shown} with other rows. Export it again.")
    if {"qflow", "plugin", "sure"} <= columns:
        names = {row["qflow"]: (row["plugin"], row["sure"] == "yes") for row in rows if row["plugin"]}
        return Content(NAMES, names=names)
    if {"qflow", "nodes"} <= columns:
        return Content(NODES, nodes={row["qflow"]: tuple(row["nodes"].split()) for row in rows})
    raise ImportFileError(f"{rule}, but got {shown} with other columns. Export it again.")
