"""A search that is killed at random moments, many times; a part of benchmarks/reliability.py.

Each round starts the same search in a new process on the same store and ends it after a random time, with SIGKILL or,
in a share `--terms` of the rounds, with SIGTERM. In the first fifth of the rounds this may happen while the databases
are created. A last round runs to the end. Then the benchmark checks that study and tracker agree on every trial, that
no trial is missing, and that no point was evaluated again after its commit. Study and tracker must also agree after
each SIGTERM.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # imported here, so that no round spends time on it

from qflow.process.interrupts import interrupts
from qflow.search.domain import Choice, Interval, Space, Values, point_key
from qflow.search.loop import run_trials
from qflow.search.outcome import Outcome
from qflow.search.reconcile import check_invariants
from qflow.search.study import Study
from qflow.tracking.mlflow_tracker import MlflowTracker

SPACE: Space = {
    "calibration.method": Choice(("minmax", "kl", "mse", "percentile")),
    "int16_ratio": Interval(0, 1),
    "lr": Interval(1e-6, 1e-3, log=True),
}
FIXED = [("all-int8", {"int16_ratio": 0.0}), ("all-int16", {"int16_ratio": 1.0})]
CLEAN, FULL = 3, 0  # exit codes of a round: ended by SIGTERM in order, ran to the end


@dataclass(frozen=True)
class Stores:
    """Where runs and searches are kept: by default in SQLite files in the folder of the search."""

    uri: str | None = None
    storage: str | None = None
    study: str = "kill/loop"

    @property
    def served(self) -> bool:
        """Whether the stores outlive the folder of a round."""
        return self.uri is not None or self.storage is not None


LOCAL = Stores()


def open_search(folder: Path, stores: Stores = LOCAL) -> tuple[Study, MlflowTracker]:
    """Study and tracker of the search in `folder`."""
    tracker = MlflowTracker.open(stores.uri, folder, "kill-loop")
    folder.mkdir(parents=True, exist_ok=True)
    study = Study.open(
        stores.storage or folder,
        stores.study,
        space=SPACE,
        directions=("maximize", "minimize"),
        n_trials=40,
        locks=folder,
        patient=partial(tracker.patience.call, stores.storage),
    )
    return study, tracker


def evaluator(log: Path, seconds: float) -> Callable[[Values, Path], Outcome]:
    """A function that evaluates for `seconds`, writes ten files and 30 values, and logs its start in `log`."""

    def evaluate(params: Values, folder: Path) -> Outcome:
        with open(log, "a", encoding="utf-8") as file:
            file.write(point_key(params) + "\n")
        time.sleep(seconds)
        for i in range(10):
            (folder / f"file{i}.txt").write_text("content " * 100)
        ratio = float(params["int16_ratio"] or 0)
        metrics = {"accuracy/drop": 0.1 - 0.1 * ratio, "cost/latency_ms": 1 + ratio}
        metrics |= {f"detail/{i}": ratio * i for i in range(28)}
        values = {**params, **{f"setting.{i}": i for i in range(27)}}
        return Outcome((0.7 + 0.1 * ratio, 1 + ratio), {"drop": 0.02 - ratio}, values, metrics)

    return evaluate


def round_in_child(folder: Path, trials: int, stores: Stores = LOCAL) -> int:
    """Start the search in a forked process and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with interrupts():
            study, tracker = open_search(folder, stores)
            evaluate = evaluator(folder / "evaluations.log", 0.02)
            run_trials(
                study,
                tracker,
                evaluate,
                n_trials=trials,
                fixed=FIXED,
                scratch=folder / "scratch",
                checkpoint=lambda _: (folder / "began").touch(),
            )
        code = FULL
    except KeyboardInterrupt:
        code = CLEAN
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def check_in_child(folder: Path, stores: Stores = LOCAL) -> int:
    """Print the problems of the store from a process of its own, and return their number."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    problems = check_invariants(*open_search(folder, stores))
    print("\n".join(problems), end="\n" if problems else "", flush=True)
    os._exit(min(100, len(problems)))


def kill_rounds(
    folder: Path, kills: int, terms: float, trials: int, rng: random.Random, stores: Stores = LOCAL
) -> collections.Counter[str]:
    """Run the rounds that are ended by a signal; returns how often each kind of end occurred."""
    ends: collections.Counter[str] = collections.Counter()
    for turn in range(kills):
        if turn == kills // 5:
            check_in_child(folder, stores)  # creates the databases if none is complete yet
        (folder / "began").unlink(missing_ok=True)
        child = round_in_child(folder, trials, stores)
        time.sleep(rng.uniform(0.0, 3.0) if turn < kills // 5 else rng.uniform(0.05, 0.7))
        sign = signal.SIGTERM if rng.random() < terms else signal.SIGKILL
        os.kill(child, sign)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ends["complete" if code == FULL else "SIGTERM in order" if code == CLEAN else f"code {code}"] += 1
        if code == CLEAN and (folder / "began").exists():  # earlier, a trial of the last kill may be left
            ends["disagreements after SIGTERM"] += check_in_child(folder, stores)
    return ends


def final_checks(folder: Path, trials: int, stores: Stores = LOCAL) -> list[str]:
    """The problems after the last round, one sentence each."""
    study, tracker = open_search(folder, stores)
    problems = check_invariants(study, tracker)
    kept = study.trials()
    complete = [trial for trial in kept if trial.state == "complete"]
    if len(complete) != trials:
        problems.append(f"{len(complete)} trials are complete, not {trials}.")
    began = collections.Counter((folder / "evaluations.log").read_text().splitlines())
    lost = collections.Counter(point_key(trial.params) for trial in kept if trial.state == "fail")
    for trial in complete:
        point = point_key(trial.params)
        if began[point] > 1 + lost[point]:
            problems.append(f"Trial {trial.number} was evaluated {began[point]} times, lost {lost[point]}.")
    endings = collections.Counter(trial.ending or trial.state for trial in kept)
    print(f"trials: {dict(endings)}; labels kept: {sorted(t.label for t in complete if t.label)}")
    return problems
