"""Worker processes of a study are killed while they evaluate; a part of benchmarks/reliability.py."""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from benchmarks.command_ends import prepared
from benchmarks.tampering import STUDY, command
from qflow.search.reconcile import check_invariants
from qflow.search.study import Study
from qflow.tracking.mlflow_tracker import MlflowTracker

WORKERS = ("executor=process", "executor.workers=2", "executor.max_retries=10")


def worker_kills(folder: Path, kills: int, rng: random.Random) -> list[str]:
    """Kill a random worker, `kills` times in one study or more; the results must be those of one process."""
    target, violations = prepared(folder), list[str]()
    ends: collections.Counter[str] = collections.Counter()
    while ends["workers killed"] < kills:
        name = f"workers/round{ends['studies']}"
        arguments = (*STUDY, *WORKERS, f"study={name}", f"root={target.root}")
        child = _in_child(lambda: command("tune", *arguments))  # noqa: B023
        ends["studies"] += 1
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            time.sleep(rng.uniform(0.5, 4.0))
            if (found := _workers(child)) and ends["workers killed"] < kills:
                ends["workers killed"] += 1
                with suppress(ProcessLookupError):
                    os.kill(rng.choice(found), signal.SIGKILL)
        code = os.waitstatus_to_exitcode(done[1])
        if code != 0:
            return [*violations, f"{name} ended with {code}"]
        best = json.loads((target.root / "studies" / name / "best.json").read_text())
        if best["metrics"] != target.best["metrics"]:
            violations.append(f"{name}: the best trial has other numbers than in one process: {best['metrics']}")
        violations += _disagreements(target.root, name)
    print(dict(ends))
    return violations


def _in_child(work: Callable[[], tuple[int, str]]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code, text = work()
        print(text[-1000:] if code else "", end="", flush=True)
        os._exit(code)
    return child


def _workers(process: int) -> list[int]:
    """Return the ids of the worker processes below a process."""
    found, parents = [], [process]
    while parents:
        children = [int(p) for p in Path(f"/proc/{parents[0]}/task/{parents[0]}/children").read_text().split()]
        parents = [*parents[1:], *children]
        for child in children:
            with suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
    return found


def _disagreements(root: Path, name: str) -> list[str]:
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        rows = database.execute("SELECT run_uuid FROM runs WHERE status = 'RUNNING'").fetchall()
    found = [f"{key} is RUNNING" for (key,) in rows]
    if not (child := os.fork()):  # databases that were opened must not be used after a fork
        problems = check_invariants(Study.read(root, name), MlflowTracker.open(None, root, "digits"))
        print("\n".join(problems), end="\n" if problems else "", flush=True)
        os._exit(min(100, len(problems)))
    wrong = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return found + ([f"{name}: study and runs disagree in {wrong} places"] if wrong else [])
