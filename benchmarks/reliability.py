"""Proves that nothing is lost and nothing is let in: `python -m benchmarks.reliability [part ...]`.

kills       a search is ended 200 times at random moments, by SIGKILL and SIGTERM
stops       a search is killed before and after each of its calls to MLflow and to Optuna's storage
faults      each of these calls fails, before it has an effect and after it (the answer is lost)
commands    every other command is killed, terminated and interrupted, at random moments and at its calls to MLflow
postgresql  kills, stops and faults again, with the search in PostgreSQL, and the runs behind an MLflow server
servers     an MLflow server and PostgreSQL are killed, and started again, while a search runs
promotes    two trials of a study are promoted at once
ownership   one study from two hosts (network namespaces), and the network of its owner is cut
workers     a worker of a study in two processes is killed, again and again
disk        the disk of `qflow.tune` is full, at 30 sizes
tampered    a stored trial, an archive and the cache are changed at random, 100 times, and promoted, imported or used

After each disturbance the same search runs again undisturbed. Then study and runs must agree on every trial, no trial
may be missing, and no point may have been evaluated again after its commit. Of what was tampered with, nothing may be
executed or registered. The exit code is 1 if there is a violation.

A crash of the machine and network file systems are not tested.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import kill_loop
from benchmarks.command_ends import command_ends
from benchmarks.full_disk import full_disk
from benchmarks.on_servers import on_postgresql, servers_killed
from benchmarks.ownership import ownership
from benchmarks.store_calls import at_each_call, fail, kill
from benchmarks.tampering import tampered
from benchmarks.two_promotes import two_promotes
from benchmarks.worker_kills import worker_kills


def kills(folder: Path, times: int, seed: int) -> list[str]:
    """Kill a search at random moments."""
    place, trials = folder / "killed", times + times // 2
    ends = kill_loop.kill_rounds(place, times, 0.2, trials, random.Random(seed))
    last = os.waitstatus_to_exitcode(os.waitpid(kill_loop.round_in_child(place, trials), 0)[1])
    print(f"rounds: {dict(ends)}")
    found = kill_loop.final_checks(place, trials)
    found += [] if last == kill_loop.FULL else [f"The last round ended with {last}."]
    return found + ["Study and tracker disagree after SIGTERM."] * ends["disagreements after SIGTERM"]


def main() -> int:
    """Run the parts; return 1 if there is a violation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all without a name")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--every", type=int, default=1, help="disturb only each so many-th call of stops, faults and commands"
    )
    parser.add_argument("--moments", type=int, default=24, help="random moments at which each command is ended")
    parser.add_argument("--only", nargs="*", default=(), help="commands of the part commands; all without a name")
    parser.add_argument("--servers", type=int, default=20, help="kills of servers")
    parser.add_argument("--promotes", type=int, default=10, help="rounds of two promotions at once")
    parser.add_argument("--workers", type=int, default=20, help="kills of workers")
    parser.add_argument("--disks", type=int, default=30)
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], list[str]]] = {
        "kills": lambda folder: kills(folder, options.kills, options.seed),
        "stops": lambda folder: at_each_call(folder, kill, options.every),
        "faults": lambda folder: at_each_call(folder, fail, options.every),
        "commands": lambda folder: command_ends(
            folder, options.moments, options.every, random.Random(options.seed), options.only
        ),
        "postgresql": lambda folder: on_postgresql(folder, options.kills, options.every, random.Random(options.seed)),
        "servers": lambda folder: servers_killed(
            folder, options.servers, 4 * options.servers, random.Random(options.seed)
        ),
        "promotes": lambda folder: two_promotes(folder, options.promotes),
        "ownership": ownership,
        "workers": lambda folder: worker_kills(folder, options.workers, random.Random(options.seed)),
        "disk": lambda folder: full_disk(folder, options.disks),
        "tampered": lambda folder: tampered(folder, options.changes, random.Random(options.seed)),
    }
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"a part is one of {', '.join(parts)}, but got {', '.join(unknown)}")
    total = 0
    for name in options.parts or parts:
        start = time.monotonic()
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            violations = parts[name](Path(folder))
        print("\n".join(violations[:20]), end="\n" if violations else "")
        print(f"{len(violations)} violations in {time.monotonic() - start:.0f} s", flush=True)
        total += len(violations)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
