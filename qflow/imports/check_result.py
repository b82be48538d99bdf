"""`model_check_result.txt`: the dtypes of every operator and the remarks on them, as the plugin and qflow print them.

Both layouts are read: the plugin's tables between lines of `|`, and columns under a rule of dashes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from qflow.analysis.measures.tables import Finding
from qflow.core.dtype import QDtype
from qflow.imports.dtypes import entry_of, parse_dtype
from qflow.imports.records import MOST_NAMES, Content, Entry, ImportFileError, Unmatched

KIND = "model check"
OUTPUTS = "Each layer out qconfig:"
WEIGHTS = "Weight qconfig:"
REMARKS = "Please check if these OPs qconfigs are expected"
HEADINGS = (
    OUTPUTS,
    WEIGHTS,
    REMARKS,
    "Fusable modules are listed below",
    "Each module called times",
    "Dtype statistics",
)
_FIXED = re.compile(r"Fixed scale (?P<scale>[0-9.eE+-]{1,30})(?! of range)")
_RULE = re.compile(r"-{2,}(?: {2,}-{2,})*\s*")


def is_check_result(text: str) -> bool:
    """Return whether `text` is that of a model check."""
    return OUTPUTS in text or "modules are fused in model" in text or "Fusable modules are listed below" in text


def read_check_result(text: str, shown: str) -> Content:
    """Return dtypes and remarks. Raises ImportFileError for a file without the dtypes of outputs."""
    rows = list(_rows(text, OUTPUTS))
    if not rows:
        raise ImportFileError(
            f"A model check lists the dtype of every output ({OUTPUTS}), but got none in {shown}. Name another file."
        )
    findings = [_finding(row) for row in _rows(text, REMARKS) if row.get("Msg")]
    fixed = {f.op: float(m["scale"]) for f in findings if (m := _FIXED.match(f.message)) and _number(m["scale"])}
    weights = {row["Module Name"]: row.get("weight dtype", "") for row in _rows(text, WEIGHTS)}
    entries: dict[str, Entry] = {}
    refused: list[Unmatched] = []
    for row in rows[:MOST_NAMES]:
        name = row["Module Name"]
        output, weight = _dtype(row.get("out dtype", "")), _dtype(weights.get(name, ""))
        scale = fixed.get(name) if isinstance(output, QDtype) and output.is_integer else None
        if name not in entries:  # further calls of a shared module follow under its name(1)
            entries[name] = entry_of(name, output, weight, scale=scale, refused=refused)
    known = {name: entry for name, entry in entries.items() if entry.says}
    return Content(KIND, known, findings=tuple(findings), refused=tuple(refused))


def _finding(row: dict[str, str]) -> Finding:
    level = row.get("level", "check")
    return Finding(row["Module Name"], level if level in ("info", "check", "error") else "check", row["Msg"])


def _rows(text: str, heading: str) -> Iterator[dict[str, str]]:
    """Return the rows of the table under `heading` by column; nothing without the table."""
    lines = iter(text.splitlines())
    for line in lines:
        if line.strip().startswith(heading):
            break
    block: list[str] = []
    for line in lines:
        if line.strip().startswith(HEADINGS) or (block and not line.strip()):
            break
        block += [line] if line.strip() else []
    cells = list(_cells(block))
    header = cells[0] if cells else []
    for row in cells[1:]:
        found = dict(zip(header, row, strict=False))
        if found.get("Module Name"):
            yield found


def _cells(block: Sequence[str]) -> Iterator[list[str]]:
    if any(line.lstrip().startswith("|") for line in block):
        for line in block:
            inner = line.strip()
            if inner.startswith("|") and not set(inner) <= set("|+-=: "):
                yield [cell.strip() for cell in inner.strip("|").split("|")]
        return
    rule = next((i for i, line in enumerate(block) if _RULE.fullmatch(line)), None)
    if not rule:
        return
    spans = [match.span() for match in re.finditer(r"-+", block[rule])]
    ends = [start for start, _ in spans[1:]] + [None]
    for line in (block[rule - 1], *block[rule + 1 :]):
        yield [line[start:end].strip() for (start, _), end in zip(spans, ends, strict=True)]


def _dtype(text: str) -> QDtype | str | None:
    """Return the dtype of a cell: `qint8`, or a list of them that are all the same, `['qint8']`."""
    names = set(re.findall(r"[\w.]+", text))
    return parse_dtype(names.pop()) if len(names) == 1 else None


def _number(text: str) -> bool:
    try:
        return 0.0 < float(text) < float("inf")
    except ValueError:
        return False
