"""A search whose calls to MLflow and to Optuna's storage are stopped, or fail, one after the other.

A part of benchmarks/reliability.py. Each round runs in a process of its own, because a database that was opened before
a fork must not be used after it.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import kill_loop
from benchmarks.kill_loop import Stores
from qflow.search.loop import run_trials

TRIALS = 4
CLIENT = ("create_run", "update_run", "get_run", "search_runs", "log_batch", "log_artifacts", "set_terminated")
STORAGE = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "get_all_trials",
    "get_trial",
)


class Injected(Exception):
    """A store's failure; its class has the module of a foreign error, as those of MLflow and SQLAlchemy do."""


Injected.__module__ = "sqlalchemy.exc"


class Injection:
    """Counts the calls to wrapped methods and disturbs the one with number `at`, from 1; 0 disturbs none."""

    def __init__(self, at: int = 0, disturb: Callable[[], None] | None = None, after: bool = False) -> None:
        self.at = at
        self.disturb = disturb or fail
        self.after = after
        self.calls = 0

    def wrap(self, target: Any, names: tuple[str, ...]) -> None:
        """Replace methods of an object by ones that count and disturb."""
        for name in names:
            setattr(target, name, self._wrapped(getattr(target, name)))

    def _wrapped(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            mine = self.calls == self.at
            if mine and not self.after:
                self.disturb()
            result = call(*arguments, **options)
            if mine and self.after:
                self.disturb()
            return result

        return wrapped


def kill() -> None:
    """End this process as SIGKILL does."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """Raise the error of a store."""
    raise Injected("injected")


def search(folder: Path, injection: Injection, stores: Stores = kill_loop.LOCAL) -> None:
    """Run the search of benchmarks/kill_loop.py in `folder` with disturbed calls."""
    study, tracker = kill_loop.open_search(folder, stores)
    injection.wrap(tracker.client, CLIENT)
    injection.wrap(study._study._storage, STORAGE)  # below Optuna's logic, where a database would fail
    evaluate = kill_loop.evaluator(folder / "evaluations.log", 0.0)
    run_trials(study, tracker, evaluate, n_trials=TRIALS, fixed=kill_loop.FIXED, scratch=folder / "scratch")


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; return its exit code: 0, 2 for an exception, -9 after a kill."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 2
    with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
        work()
        code = 0
    os._exit(code)


def at_each_call(folder: Path, disturb: Callable[[], None], every: int, stores: Stores = kill_loop.LOCAL) -> list[str]:
    """Disturb each `every`-th call of a search, before and after it has an effect.

    With stores on servers every round has a study of its own. Returns the violations, one sentence each, after the
    search has run once more undisturbed.
    """
    place, empty = folder / "round", folder / "empty"
    kill_loop.check_in_child(place, stores)  # creates the databases, which name this place
    place.rename(empty)
    calls = _count(empty, place, replace(stores, study=f"kill/count-{disturb.__name__}"))
    ends: collections.Counter[str] = collections.Counter()
    violations = []
    for at in range(every, calls + 1, every):
        for after in (False, True):
            shutil.copytree(empty, place)
            injection = Injection(at, disturb, after)
            own = replace(stores, study=f"kill/{disturb.__name__}-{at}-{int(after)}") if stores.served else stores
            end = in_child(lambda: search(place, injection, own))  # noqa: B023
            ends[{0: "went on", 2: "ended with an error"}.get(end, "killed")] += 1
            moment = f"{'after' if after else 'before'} call {at}"
            violations += [f"{moment}: {text}" for text in _problems_at_next_start(place, own)]
            shutil.rmtree(place)
    print(f"{calls} calls, {sum(ends.values())} rounds: {dict(ends)}")
    return violations


def _count(empty: Path, place: Path, stores: Stores) -> int:
    def counted() -> None:
        injection = Injection()
        search(place, injection, stores)
        (place / "calls").write_text(str(injection.calls))

    shutil.copytree(empty, place)
    in_child(counted)
    calls = int((place / "calls").read_text())
    shutil.rmtree(place)
    return calls


def _problems_at_next_start(place: Path, stores: Stores) -> list[str]:
    def check() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            (place / "problems").write_text("\n".join(kill_loop.final_checks(place, TRIALS, stores)))

    if (again := in_child(lambda: search(place, Injection(), stores))) != 0:
        return [f"The next start ended with {again}."]
    return (place / "problems").read_text().splitlines() if in_child(check) == 0 else ["The last check failed."]
