"""model_check_result.txt of the plugin's check_qat_model: the dtypes that a prepared model computes with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from qflow.core.dtype import QDtype

OUTPUTS, WEIGHTS = "Each layer out qconfig:", "Weight qconfig:"
_DECORATED = re.compile(r"(?P<name>.+?)(?:\[\w+\])?(?:\(\d+\))?")  # name[method], name(n)
DTYPES = {"qint8": QDtype.qint8, "qint16": QDtype.qint16, "float16": QDtype.float16}


@dataclass
class CheckedModule:
    """One module of a prepared model; a dtype is None where it computes in float32."""

    name: str
    type: str
    output: QDtype | None
    weight: QDtype | None = None


def read_check(text: str) -> dict[str, CheckedModule]:
    """Return the modules of the file by name, the first call of each. Tables that are not there give none."""
    found: dict[str, CheckedModule] = {}
    for row in _rows(text, OUTPUTS):
        name = _plain(row["Module Name"])
        found.setdefault(name, CheckedModule(name, row["Module Type"], _dtype(row["out dtype"])))
    for row in _rows(text, WEIGHTS):
        if (module := found.get(_plain(row["Module Name"]))) is not None:
            module.weight = _dtype(row["weight dtype"])
    return found


def _plain(name: str) -> str:
    match = _DECORATED.fullmatch(name)
    return match["name"] if match else name


def _dtype(text: str) -> QDtype | None:
    return DTYPES.get(text.removeprefix("torch."))


def _rows(text: str, heading: str) -> Iterator[dict[str, str]]:
    """Yield the rows of the psql table below a heading by column."""
    columns: list[str] = []
    for line in text.partition(heading)[2].lstrip("\n").splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not columns:
                columns = cells
            elif len(cells) == len(columns):
                yield dict(zip(columns, cells, strict=True))
        elif not line.startswith(("|-", "+-")):
            return
