"""One study from two hosts, whose network fails; a part of benchmarks/reliability.py.

Two network namespaces with host names of their own stand for the hosts. Both reach one PostgreSQL server. While the
first drives the study, a start on the second must be refused. Then the first loses its network: the second takes the
study over. When the network is back, the first must notice it, commit nothing more, and leave. After one more start
study and runs must agree, and no trial may be there twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import kill_loop
from benchmarks.kill_loop import Stores
from benchmarks.servers import MISSING, Postgresql
from qflow.config.foreign import foreign_line
from qflow.core.errors import QflowError
from qflow.search.loop import driving
from qflow.tracking.lease import owned

SECONDS, BEAT = 6.0, 1.0  # of the lease: without a heartbeat for so long an owner is dead
TRIALS = 40
NAMES = ("qflow-a", "qflow-b")
BRIDGE, ADDRESS = "qflow-net", "10.213.7.{}"


def own(uri: str, storage: str, folder: Path) -> int:
    """Drive the study until it has all trials; print each. Return 2, with the reason, if it is another's."""
    stores = Stores(uri, storage, "kill/owned")
    try:
        study, tracker = kill_loop.open_search(folder, stores)
        lease = owned(tracker, study.name, folder, say=print, seconds=SECONDS, beat=BEAT)
        evaluate = kill_loop.evaluator(folder / "evaluations.log", 0.3)
        with driving(study, tracker, evaluate, scratch=folder / "scratch", owned=lease) as driver:
            while len(driver.trials) < TRIALS and driver.sample() is not None:
                print("trial", len(driver.trials), flush=True)
    except Exception as error:
        print(line := str(error) if isinstance(error, QflowError) else foreign_line(error), flush=True)
        if not line:
            raise
        return 2
    return 0


class _Host:
    """A start of the study in a network namespace."""

    def __init__(self, name: str, stores: Stores, folder: Path) -> None:
        self.said: list[str] = []
        command = [sys.executable, "-m", "benchmarks.ownership", str(stores.uri), str(stores.storage), str(folder)]
        within = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        self.process = subprocess.Popen(
            [*within, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())

    def until(self, text: str, seconds: float = 120) -> bool:
        """Wait until a line that begins with `text` was printed; return whether it was."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if any(line.startswith(text) for line in self.said):
                return True
            time.sleep(0.1)
        return False

    def code(self) -> int:
        """Wait for its end; return its exit code."""
        code = self.process.wait(300)
        self._reader.join(10)
        return code


@contextmanager
def _network() -> Iterator[str]:
    """Make two namespaces on a bridge; yield why it is not possible here, or an empty text."""
    why = ""
    try:
        why = _ip("link", "add", BRIDGE, "type", "bridge") or _ip(
            "addr", "add", f"{ADDRESS.format(1)}/24", "dev", BRIDGE
        )
        why = why or _ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(NAMES, 2):
            far, near = f"qf-{number}", f"qfn-{number}"
            why = why or _ip("netns", "add", name)
            why = why or _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
            why = why or _ip("link", "set", near, "master", BRIDGE, "up")
            why = why or _ip("-n", name, "addr", "add", f"{ADDRESS.format(number)}/24", "dev", far)
            why = why or _ip("-n", name, "link", "set", far, "up") or _ip("-n", name, "link", "set", "lo", "up")
        yield why
    finally:
        for name in NAMES:
            _ip("netns", "delete", name)
        _ip("link", "delete", BRIDGE)


def _ip(*arguments: str) -> str:
    """Run ip; return what it says if it fails."""
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"ip ended with {done.returncode}" if done.returncode else ""


def ownership(folder: Path) -> list[str]:
    """Let two hosts start one study, and cut the network of its owner; return the violations."""
    if MISSING:
        print(f"not run: {MISSING}")
        return []
    with _network() as why:
        if why or os.geteuid():
            print(f"not run: network namespaces need the right to make them ({why or 'not root'})")
            return []
        with Postgresql(ADDRESS.format(1)) as database:
            return _two_hosts(folder, Stores(database.url("mlflow"), database.url("search"), "kill/owned"))


def _two_hosts(folder: Path, stores: Stores) -> list[str]:
    found = []
    places = [folder / name for name in NAMES]
    kill_loop.check_in_child(places[0], stores)
    first = _Host(NAMES[0], stores, places[0])
    if not first.until("trial 2"):
        return [f"the first host did not begin: {first.said}"]
    second = _Host(NAMES[1], stores, places[1])
    if second.code() != 2 or not any("while another drives it" in line for line in second.said):
        found.append(f"a second owner was not refused: {second.said}")
    print(f"refused: {second.said[-1]}")
    _ip("link", "set", "qfn-2", "down")
    third = _Host(NAMES[1], stores, places[1])
    if not third.until("trial"):
        found.append(f"the second host did not take over: {third.said}")
    _ip("link", "set", "qfn-2", "up")
    codes = [first.code(), third.code()]
    print(f"the network was cut: the owner ended with {codes[0]}, the other with {codes[1]}")
    print(f"{first.said[-1]}\n{third.said[-1]}")
    if codes != [2, 0]:
        found.append(f"the hosts ended with {codes}")
    logs = [place / "evaluations.log" for place in places]
    (places[1] / "evaluations.log").write_text("".join(log.read_text() for log in logs))
    os.waitpid(kill_loop.round_in_child(places[1], TRIALS, stores), 0)  # ends the run of a trial that was cut off
    return found + kill_loop.final_checks(places[1], TRIALS, stores)


if __name__ == "__main__":
    sys.exit(own(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
