"""Searches on PostgreSQL behind an MLflow server, and servers that are killed; a part of benchmarks/reliability.py.

Runs are in the database `mlflow`, which an MLflow server serves; the search is in the database `search`.
"""

from __future__ import annotations

import collections
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import kill_loop
from benchmarks.kill_loop import Stores
from benchmarks.servers import MISSING, MlflowServer, Postgresql
from benchmarks.store_calls import at_each_call, fail, kill


@contextmanager
def served(folder: Path) -> Iterator[tuple[Postgresql, MlflowServer, Stores]]:
    """Start both servers."""
    with (
        Postgresql() as database,
        MlflowServer(folder, database.url("mlflow")) as server,
    ):
        yield database, server, Stores(server.uri, database.url("search"))


def on_postgresql(folder: Path, kills: int, every: int, rng: random.Random) -> list[str]:
    """Kill a search at its calls and at random moments, and let its calls fail."""
    if MISSING:
        print(f"not run: {MISSING}")
        return []
    with served(folder) as (_, _, stores):
        found = at_each_call(folder / "stops", kill, every, stores)
        found += at_each_call(folder / "faults", fail, every, stores)
        place, trials = folder / "killed", kills + kills // 2
        ends = kill_loop.kill_rounds(place, kills, 0.2, trials, rng, stores)
        found += _finished(place, trials, stores)
        print(f"{kills} rounds: {dict(ends)}")
    return found + ["Study and tracker disagree after SIGTERM."] * ends["disagreements after SIGTERM"]


def servers_killed(folder: Path, kills: int, trials: int, rng: random.Random) -> list[str]:
    """Kill the MLflow server, or PostgreSQL with it, while a search runs; both come back after a moment.

    The search may wait for the server or end with an error; then it is started again, as a user would.
    """
    if MISSING:
        print(f"not run: {MISSING}")
        return []
    ends: collections.Counter[str] = collections.Counter()
    with served(folder) as (database, server, stores):
        place = folder / "search"
        kill_loop.check_in_child(place, stores)
        child = kill_loop.round_in_child(place, trials, stores)
        for turn in range(kills):
            time.sleep(rng.uniform(0.2, 2.0))
            which: tuple[Callable[[], None], ...] = (server.kill, server.start)
            if turn % 2:
                which = (database.kill, database.start)
            ends["PostgreSQL killed" if turn % 2 else "MLflow server killed"] += 1
            which[0]()
            time.sleep(rng.uniform(0.0, 1.0))
            which[1]()
            if (done := os.waitpid(child, os.WNOHANG)) != (0, 0):
                ends[f"search ended with {os.waitstatus_to_exitcode(done[1])}"] += 1
                child = kill_loop.round_in_child(place, trials, stores)
        ends[f"search ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}"] += 1
        print(f"{kills} kills: {dict(ends)}")
        return _finished(place, trials, stores)


def _finished(place: Path, trials: int, stores: Stores) -> list[str]:
    """Run the search to its end and return what is wrong then."""
    last = os.waitstatus_to_exitcode(os.waitpid(kill_loop.round_in_child(place, trials, stores), 0)[1])
    found = kill_loop.final_checks(place, trials, stores)
    return found + ([] if last == kill_loop.FULL else [f"The last round ended with {last}."])
