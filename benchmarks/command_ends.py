"""Every command that writes is killed, interrupted and terminated; a part of benchmarks/reliability.py.

Each round runs a command in a process of its own on a copy of a finished study and ends it at a random moment, or at
one of its calls to MLflow, by SIGKILL, SIGTERM or Ctrl-C. After a signal that can be caught, the command must have said
in one line that it was interrupted, with its exit code, and nothing may be RUNNING or left over. After a kill the same
command runs once more, and then the same must hold, and its result must be that of a command that was never disturbed.
"""

from __future__ import annotations

import atexit
import importlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.store_calls import Injection
from benchmarks.tampering import Target
from qflow.config.command_table import COMMANDS, MISTAKE
from qflow.core.temporary import PREFIX
from qflow.process.interrupts import INTERRUPTED, end_at_once

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CALLS = (
    "create_run", "update_run", "get_run", "search_runs", "log_batch", "log_inputs", "log_artifacts", "log_artifact",
    "set_tag", "set_terminated", "create_experiment", "create_logged_model", "log_model_artifacts",
    "finalize_logged_model", "create_registered_model", "create_model_version", "set_registered_model_alias",
    "set_model_version_tag",
)  # fmt: skip
VARYING = ("run", "seconds", "version", "notes", "url", "number", "run_id", "key", "next")
"""Fields of a result that differ between two starts of a command."""
CALIBRATION = ("calibration.batch_size=8", "calibration.steps=2")


@dataclass(frozen=True)
class Case:
    """A command with its arguments, in a folder of its own below which it writes."""

    name: str
    arguments: tuple[str, ...]
    once: bool = False
    """Whether it refuses to do again what it had done when it was killed."""


def cases(folder: Path, target: Target) -> list[Case]:
    """The commands that write, each as a user calls it."""
    study = ("study=digits/int8_int16", "tracking.experiment=digits")
    digits = ("+experiment=int8_int16", "task=digits", "repair=none", *CALIBRATION)
    return [
        Case("promote", (*study, "tracking.registered_model=digits")),
        Case("analyze", ("task=digits", "stages=[badcase,layers]", "repair=none", *CALIBRATION)),
        Case("trial", (*digits, "study=digits/mine", "qconfig.int16_ratio=0.5")),
        Case("cost", ("task=digits",)),
        Case("report", study),
        Case("export", (*study, "target=qflow", f"out={folder}/root/export")),
        Case("export", (*study, f"bundle={folder}/root/study.zip"), once=True),
        Case("export", (f"import={target.archive}", f"root={folder}/root/other"), once=True),
        Case("compare", (target.run, target.run, f"out={folder}/root/compare.html")),
    ]


class Rounds:
    """The rounds of one command: each begins with the store as the study has left it."""

    def __init__(self, place: Path, target: Target, case: Case, code: int = 0) -> None:
        self.place, self.target, self.case, self.code = place, target, case, code
        self.temporary = place / "tmp"
        self.begin()
        start = time.monotonic()
        calls = Injection()
        self.expected = self.result(*self.run(calls))
        self.seconds = time.monotonic() - start
        self.calls = int((self.temporary / "calls").read_text())

    def begin(self) -> None:
        """Put the store back."""
        self.target.put_back()
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()

    def run(self, injection: Injection, ended_after: float | None = None, sign: int = 0) -> tuple[int, str, str]:
        """Run the command in a forked process; return its exit code and what it printed on stdout and stderr."""
        sys.stdout.flush()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                os._exit(self._command(injection))
            if ended_after is not None:
                time.sleep(ended_after)
                os.kill(child, sign)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            return code, out.read().decode(errors="replace"), err.read().decode(errors="replace")

    def _command(self, injection: Injection) -> int:
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # folders of the parent, which stay
        end_at_once()
        os.environ["TMPDIR"], tempfile.tempdir = str(self.temporary), None
        injection.wrap(MlflowClient, CALLS)
        own = [word for word in self.case.arguments if word.startswith("root=")]
        root = [] if own else [f"root={self.target.root}"]
        sys.argv = [f"qflow.{self.case.name}", *self.case.arguments, *root, "--json"]
        try:
            importlib.import_module(f"qflow.commands.{self.case.name}").main()
        except SystemExit as end:
            if not injection.at:
                (self.temporary / "calls").write_text(str(injection.calls))
            return int(end.code or 0)
        finally:
            atexit._run_exitfuncs()  # os._exit leaves them out
            sys.stdout.flush()
            sys.stderr.flush()
        return 0

    def result(self, code: int, out: str, err: str) -> Any:
        """What a command that was not disturbed has found, without what varies."""
        if code != self.code:
            return f"ended with {code}: {err[-300:]}"
        return _steady(json.loads(out)["result"])

    def at_moment(self, sign: int, seconds: float) -> list[str]:
        """End the command by a signal after some seconds."""
        return self._checked(sign, *self.run(Injection(), seconds, sign))

    def at_call(self, sign: int, at: int, after: bool) -> list[str]:
        """End the command by a signal at one of its calls."""
        return self._checked(sign, *self.run(Injection(at, lambda: os.kill(os.getpid(), sign), after)))

    def _checked(self, sign: int, code: int, out: str, err: str) -> list[str]:
        found = []
        if sign == signal.SIGKILL:
            if code == -sign:
                again = self.run(Injection())
                if not (self.case.once and again[0] == MISTAKE and "which exists" in again[2]):
                    found += _differences(self.expected, self.result(*again))
        elif code == INTERRUPTED:
            said = [line for line in err.splitlines() if line.startswith("qflow: Interrupted")]
            found += [] if len(said) == 1 and "Traceback" not in err else [f"it said {err[-300:]!r}"]
        elif code != self.code:
            found.append(f"it ended with {code}: {err[-300:]!r}")
        return found + self._left()

    def _left(self) -> list[str]:
        """What is still open or left over."""
        found = []
        for store in self.target.root.rglob("mlflow.db"):
            with closing(sqlite3.connect(store)) as database:
                rows = database.execute("SELECT run_uuid FROM runs WHERE status = 'RUNNING'").fetchall()
                models = database.execute("SELECT model_id FROM logged_models WHERE status = 1").fetchall()
            found += [f"{key} is RUNNING" for (key,) in rows] + [f"{key} is pending" for (key,) in models]
        left = [*self.target.root.rglob(f"{PREFIX}*"), *self.temporary.iterdir()]
        found += [f"{path} is left over" for path in left if path.name != "calls" and "db_init_lock" not in path.name]
        return found


def _said(case: Case, where: str, violations: list[str]) -> list[str]:
    for text in violations:
        print(f"{case.name} {where}: {text}", flush=True)
    return [f"{case.name} {where}: {text}" for text in violations]


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if key not in VARYING}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def _differences(expected: Any, found: Any) -> list[str]:
    """The places in which the next start's result differs from that of an undisturbed command."""
    before, after = dict(_leaves(expected, "")), dict(_leaves(found, ""))
    other = [place for place in {**before, **after} if before.get(place) != after.get(place)]
    shown = [f"{place}: {after.get(place)!r} in place of {before.get(place)!r}"[:200] for place in other[:5]]
    return [f"the next start differs in {len(other)} values: {'; '.join(shown)}"] if other else []


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield place, value
    for key, item in items:
        yield from _leaves(item, f"{place}/{key}")


def prepared(folder: Path) -> Target:
    """Import what commands need, so that no round spends time on it, and make the study."""
    for name in ("pandas", "matplotlib.pyplot", "torch._dynamo", "sqlalchemy.dialects.sqlite", "hydra.main"):
        importlib.import_module(name)
    for name in COMMANDS:
        importlib.import_module(f"qflow.commands.{name}")
    for name in ("study.finish", "study.by_hand", "study.rebuild", "study.archive", "study.report", "api.registered"):
        importlib.import_module(f"qflow.{name}")
    return Target(folder)


def command_ends(folder: Path, times: int, every: int, rng: random.Random, only: Sequence[str] = ()) -> list[str]:
    """End each command `times` times at random moments, and at each `every`-th call; return the violations."""
    target, violations = prepared(folder), list[str]()
    print(f"{'command':<18}{'calls':>6}{'ended at calls':>16}{'at moments':>12}{'violations':>12}")
    for case in [case for case in cases(folder, target) if not only or case.name in only]:
        rounds, found = Rounds(folder, target, case), list[str]()
        signs = itertools.cycle(SIGNALS)
        places = [(at, after) for at in range(1, rounds.calls + 1, every) for after in (False, True)]
        for (at, after), sign in zip(places, signs, strict=False):
            rounds.begin()
            where = f"{sign.name} {'after' if after else 'before'} call {at}"
            found += _said(case, where, rounds.at_call(sign, at, after))
        for sign in itertools.islice(signs, times):
            rounds.begin()
            seconds = rng.uniform(0.0, rounds.seconds)
            found += _said(case, f"{sign.name} after {seconds:.2f} s", rounds.at_moment(sign, seconds))
        words = [case.name, *[w.partition("=")[0] for w in case.arguments if w.startswith(("bundle=", "import="))]]
        print(f"{' '.join(words):<18}{rounds.calls:>6}{len(places):>16}{times:>12}{len(found):>12}", flush=True)
        violations += found
    return violations
