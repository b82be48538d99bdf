"""Reads files of any known format, one or several that belong together, and matches them with a model.

The content of a file tells its format, within what its suffix allows: `.pt` (dtypes of the plugin, scales of a
calibrated model), `.json` (qconfig of qflow, quant_config of HMCT), `.txt` (model check), `.py` (qconfig_j6m.py of an
export), `.csv` (names.csv, nodes.csv of an export, which say what the names in another file mean).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qflow.analysis.measures.tables import Finding, SensitivityTable
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.record import digest, sha256
from qflow.core.text_file import read_text
from qflow.imports.check_result import is_check_result, read_check_result
from qflow.imports.dtypes import read_dtypes
from qflow.imports.exported import read_csv, read_module
from qflow.imports.json_files import HMCT, read_json_file
from qflow.imports.matching import Names, left_out, match, names_of, names_of_operators, not_possible
from qflow.imports.nodes import match_nodes
from qflow.imports.records import NOT_HAD, Content, Entry, Imported, ImportFileError, Unmatched, grouped, op_fields
from qflow.imports.scales import holds_scales, read_scales
from qflow.imports.sensitivity import is_table, read_rows
from qflow.imports.tensors import load
from qflow.quant.model.quantized_model import QuantizedModel

SUFFIXES = (".pt", ".json", ".txt", ".py", ".csv")
MOST_FILES = 8
LARGEST = 32 << 20  # bytes of a text; a model of 1,000 operators has 1 MB
RULE = "A mix is read from a .pt, .json, .txt or .py file"


def read_content(path: Path) -> Content:
    """Return what a file says, under its own names. Raises ImportFileError (a ConfigError), in one line."""
    shown, suffix = path.name, path.suffix.lower()
    if suffix == ".pt":
        value = load(path)
        if holds_scales(state := _state_dict(value)):
            return read_scales(state, shown)
        if isinstance(value, Mapping) and not any(hasattr(item, "numel") for item in value.values()):
            return read_dtypes(value, shown)
        if is_table(value):
            raise ImportFileError(
                f"{RULE}, but got the sensitivity table {shown}, which holds no mix. In Python: qflow.read_sensitivity."
            )
        raise ImportFileError(f"{RULE}, but got {shown} with neither dtypes nor scales. Name another file.")
    if suffix not in SUFFIXES:
        raise ImportFileError(f"{RULE}, but got {shown}. Name another file.")
    text = read_text(path, RULE, LARGEST)
    if suffix == ".json":
        return read_json_file(text, shown)
    if suffix == ".py":
        return read_module(text, shown)
    if suffix == ".csv":
        return read_csv(text, shown)
    if not is_check_result(text):
        raise ImportFileError(f"A .txt file is a model_check_result.txt, but got {shown}, which is none. Name another.")
    return read_check_result(text, shown)


def _state_dict(value: Any) -> Any:
    """Return the state dict of a checkpoint, which may hold it under `state_dict` or `model`."""
    for key in ("state_dict", "model"):
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            return value[key]
    return value


def read_mix_files(paths: Sequence[str | Path], prepared: QuantizedModel, sample: Any) -> Imported:
    """Return the precisions that files give the operators of a model. Of what two files say, the first holds.

    `sample` is an example input of the model. Raises ConfigError, in one line, for a file that is none of the known
    formats, and for files that name no operator of the model.
    """
    files, contents = _contents(paths)
    given = {op: name for content in contents for op, name in content.names.items()}
    names = names_of(prepared, sample, given)
    nodes = {op: found for content in contents for op, found in content.nodes.items()}
    return _imported(files, contents, names, prepared, nodes)


def read_mix_by_names(path: str | Path, operators: Sequence[str]) -> Imported:
    """Return the precisions that a file gives to operators of which nothing but the names is known.

    Not for a quant_config of HMCT, which says what the nodes of a graph read. Raises ConfigError for another file.
    """
    files, contents = _contents([path])
    return _imported(files, contents, names_of_operators(operators), None, {})


def _contents(paths: Sequence[str | Path]) -> tuple[list[Path], list[Content]]:
    files = [Path(os.path.expanduser(path)) for path in paths]
    if not 0 < len(files) <= MOST_FILES:
        raise ConfigError(
            f"A mix is read from 1 to {MOST_FILES} files, but got {len(files)}. Name those that it needs."
        )
    return files, [read_content(path) for path in files]


def _imported(
    files: Sequence[Path],
    contents: Sequence[Content],
    names: Names,
    prepared: QuantizedModel | None,
    nodes: Mapping[str, Sequence[str]],
) -> Imported:
    found: dict[str, Entry] = {}
    unmatched: list[Unmatched] = []
    kinds = []
    for content in contents:
        if content.names or content.nodes:
            continue
        kinds.append(content.kind)
        if content.kind == HMCT:
            assert prepared is not None
            entries, missed = match_nodes(content, prepared.graph, nodes)
        else:
            entries, missed = match(content, names)
        unmatched += [*missed, *content.refused]
        found = {op: _joined(found.get(op), entries.get(op)) for op in dict.fromkeys([*found, *entries])}
    if not found:
        shown = ", ".join(path.name for path in files)
        first = next((u.name for u in unmatched), "no name")
        raise ConfigError(
            f"A mix names operators of the model, but got {first[:80]!a} and no other in {shown}. Take the file of "
            "this model, or give names.csv or nodes.csv of an export beside it."
        )
    graph = prepared.graph if prepared is not None else None
    if graph is not None:
        unmatched += not_possible(graph, found)
    elif not all(content.own_names for content in contents):  # which of them are requests, the graph would tell
        found = {op: replace(entry, inputs=()) for op, entry in found.items()}
    modules, odd = _modules(found, names)
    return Imported(
        source=", ".join(path.name for path in files),
        kind=" and ".join(dict.fromkeys(kinds)),
        modules=modules,
        findings=tuple(finding for content in contents for finding in content.findings),
        unmatched=tuple(dict.fromkeys([*unmatched, *odd, *left_out(names, graph, found)])),
        digest=digest([sha256(path) for path in files]),
    )


def _joined(first: Entry | None, second: Entry | None) -> Entry:
    return first.with_more(second) if first and second else first or second or Entry()


def _modules(found: Mapping[str, Entry], names: Names) -> tuple[dict[str, dict[str, Any]], list[Unmatched]]:
    """Return the entries as fields of a qconfig, in the order of execution."""
    modules: dict[str, dict[str, Any]] = {}
    odd = []
    for op in names.operators:
        if op not in found or not found[op].says:
            continue
        entry = found[op]
        if entry.scale is not None and entry.output is None:  # a state dict alone does not tell the dtype
            odd.append(Unmatched(NOT_HAD, op, "a scale without its dtype: give the file with the dtypes too"))
            entry = Entry(entry.output, entry.high_precision, entry.weight, entry.inputs)
        if QDtype.float16 in (entry.output, entry.weight):
            entry = Entry(entry.output, entry.high_precision, None, entry.inputs)
        if fields := op_fields(entry):
            modules[op] = fields
    return modules, odd


def read_sensitivity_file(path: str | Path, prepared: QuantizedModel, sample: Any) -> SensitivityTable:
    """Return the table in a `.pt` file under the operators' names; its findings say what did not match.

    Raises ConfigError, in one line, for another file, and for one that names no operator of the model.
    """
    file = Path(os.path.expanduser(path))
    value = load(file)
    if not is_table(value):
        raise ImportFileError(f"A sensitivity table is a list of rows, but got another value in {file.name}.")
    table, unmatched = read_rows(value, file, names_of(prepared, sample, {}))
    missed = tuple(Finding("model", "check", f"{group}: {text}") for group, text in grouped(tuple(unmatched)))
    return replace(table, findings=(*table.findings, *missed))
