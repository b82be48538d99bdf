"""Two promotions at once, as commands; a part of benchmarks/reliability.py."""

from __future__ import annotations

import collections
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from benchmarks.command_ends import prepared
from benchmarks.tampering import Target, command

LOST = "One promotion at a time moves an alias, but got another one"


def two_promotes(folder: Path, times: int) -> list[str]:
    """Promote two trials of a study at once, `times` times: one wins, and the other says so or came later."""
    target, violations = prepared(folder), list[str]()
    ends: collections.Counter[str] = collections.Counter()
    for turn in range(times):
        violations += [f"round {turn}: {text}" for text in _round(target, ends)]
        target.put_back()
    print(f"{times} rounds: {dict(ends)}")
    return violations


def _round(target: Target, ends: collections.Counter[str]) -> list[str]:
    with closing(sqlite3.connect(target.root / "mlflow.db")) as database:
        query = "SELECT run_uuid FROM tags WHERE key = 'qflow.result' ORDER BY run_uuid LIMIT 2"
        runs = [str(row[0]) for row in database.execute(query)]

    def promoted(run: str) -> tuple[int, str]:
        terms = ("tracking.registered_model=raced", "gate.allow_dominated=true")
        return command("promote", f"run={run}", f"root={target.root}", *terms)

    with ThreadPoolExecutor(2) as both:
        done = list(both.map(promoted, runs))
    won = [text for code, text in done if code == 0]
    lost = [text for code, text in done if code == 2 and LOST in text and "Traceback" not in text]
    ends[f"{len(won)} moved the alias, {len(lost)} lost"] += 1
    if not won or len(won) + len(lost) < 2:
        return [f"ended with {code}: {text[-300:]}" for code, text in done]
    with closing(sqlite3.connect(target.root / "mlflow.db")) as database:
        (version,) = database.execute("SELECT version FROM registered_model_aliases WHERE name = 'raced'").fetchone()
    if not any(f"raced version {version}, alias champion moved" in text for text in won):
        return [f"the alias is at version {version}, which no command said: {won}"]
    return []
