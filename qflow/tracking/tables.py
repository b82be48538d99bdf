"""Tables among the files of a run: those that MLflow's UI shows as such, and those that hold values by step.

A table is a `*.json` file in pandas' layout orient="split". One whose first column is `step` is a history: its other
columns are logged as metrics by step too, so that the UI draws them as curves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

TABLES = "mlflow.loggedArtifacts"  # the tag by which the UI knows them
TABLE_HEAD = '{"columns":['  # the start of a frame that pandas writes with orient="split"
STEP = "step"


def find_tables(folder: Path) -> list[str]:
    """Return the paths in `folder` of `*.json` files in pandas' layout orient="split": columns, then data."""
    return [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.json")) if _head(p, TABLE_HEAD)]


def _head(path: Path, text: str) -> bool:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read(len(text)) == text


def tables_tag(names: Sequence[str]) -> dict[str, str]:
    """Return the tag that makes the UI show `names` as tables; none for no names."""
    entries = [{"path": name, "type": "table"} for name in dict.fromkeys(names)]
    return {TABLES: json.dumps(entries)} if entries else {}


def histories(folder: Path, tables: Sequence[str]) -> Iterator[tuple[str, float, int]]:
    """Yield (metric, value, step) of every history among `tables`, the paths that `find_tables` returned."""
    for name in tables:
        if _head(folder / name, f'{TABLE_HEAD}"{STEP}"'):
            table = json.loads((folder / name).read_text(encoding="utf-8"))
            for step, *values in table["data"]:
                yield from ((key, value, step) for key, value in zip(table["columns"][1:], values, strict=True))
