"""The loop of a search: ask the study for a point, evaluate it in a run, commit the result, tell the study.

    ask -> start run -> link -> evaluate -> COMMIT -> upload files -> values, marker -> end run -> constraints -> tell

Only one process writes to a study. If it is killed before the commit, the trial is lost and is tried again; after the
commit, which is a record on disk (spool.py), the result cannot be lost (reconcile.py). While the store is away the runs
are written later. Starting the same search again continues it: points that were measured are not measured again, so
the code of a search need not handle interruptions.

With several workers (attempt.py) the sampler's proposals are evaluated at once, but asked, committed and told by this
process alone, in the order of their numbers (driver.py).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from optuna.exceptions import UpdateFinishedTrialError

from qflow.process.interrupts import interrupts
from qflow.search.attempt import Evaluate, Executor, Serial
from qflow.search.domain import Values
from qflow.search.driver import Driver
from qflow.search.outcome import FailedTrial, FinishedTrial, Tracker
from qflow.search.reconcile import INTERRUPTED, LOST, reconcile
from qflow.search.spool import Spool, spool_of, waiting
from qflow.search.study import Study

_log = logging.getLogger(__name__)


def _nothing(*_: object) -> None:
    pass


@contextmanager
def driving(
    study: Study, tracker: Tracker, evaluate: Evaluate, *,
    scratch: Path,
    executor: Executor | None = None,
    on_trial: Callable[[FinishedTrial | FailedTrial], None] = _nothing,
    owned: AbstractContextManager[Callable[[], None]] | None = None,
    open_run: Callable[[], str] | None = None,
    checkpoint: Callable[[str], None] = _nothing,
    say: Callable[[str], None] = _log.warning,
) -> Iterator[Driver]:  # fmt: skip
    """Open the study for new trials: take its lock, own it, settle what an earlier process left, yield the driver.

    `owned` makes this process the owner of the study where it is shared (tracking/lease.py); its value raises if that
    is over, and is called before each commit. `open_run` returns the MLflow run that the trials' runs belong to, before
    anything is written for this start, and may refuse the start.
    `evaluate(params, folder)` writes the trial's files into the folder; an `executor` does so in its place. An
    exception from it fails this trial only. On Ctrl-C or SIGTERM the running trials are queued again and the interrupt
    propagates. `checkpoint` is called with the name of each step that was just done. Results that the tracking store
    does not hold yet are in the folder `spool` beside `scratch`, and `say` takes lines about them. What an earlier
    process left there is delivered first, and what is left at the end is waited for.
    Raises TrackingError if another process drives the study, TrialError after `FAILURES` failures in a row.
    """
    with interrupts() as asked_to_end, study.driver(), owned or nullcontext(_nothing) as still_owned:
        folder = scratch / quote(study.name, safe="")
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        place, goes_on = spool_of(scratch.parent, study.name), not study.shared
        spool = Spool(place, study.name, tracker, goes_on, still_owned, say, checkpoint=checkpoint)
        recovered = _opened(study, tracker, spool, open_run)
        runs = executor or Serial(evaluate, len(study.directions))
        driver = Driver(study, spool, runs, folder, on_trial, checkpoint, asked_to_end)
        try:
            spool.deliver(wait=True)
            for trial in driver.trials:
                if trial.number in recovered:
                    on_trial(trial)
            with _naming_the_other(still_owned):
                yield driver
            spool.deliver(wait=True)
        except BaseException as error:
            driver.stop()
            with suppress(Exception):  # what stays open here, the next start reconciles
                still_owned()
                stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
                reconcile(study, tracker, spool, ending=INTERRUPTED if stopped else LOST)
                spool.close()
            if waiting(spool.folder):
                say(f"{'kept':<12} {spool.kept()}, which the next start delivers")
            raise
        finally:
            runs.close()


@contextmanager
def _naming_the_other(still_owned: Callable[[], None]) -> Iterator[None]:
    """Let `still_owned` say who has the study now if another start has ended a trial of this one."""
    try:
        yield
    except UpdateFinishedTrialError:
        still_owned()
        raise


def _opened(study: Study, tracker: Tracker, spool: Spool, open_run: Callable[[], str] | None) -> list[int]:
    """Open study and run for new trials; return the numbers of trials whose results were recovered."""
    study.require_same(tracker.find_study(study.name))
    recovered = reconcile(study, tracker, spool)
    spool.parent = open_run() if open_run else tracker.open_study(study.name, tags={}, params={}, description="")
    study.begin(spool.parent)
    return recovered


def run_trials(
    study: Study, tracker: Tracker, evaluate: Evaluate, *,
    n_trials: int,
    fixed: Sequence[tuple[str, Values]] = (),
    timeout: float | None = None,
    **options: Any,
) -> list[FinishedTrial]:  # fmt: skip
    """Run trials until the study has `n_trials` finished ones; return all of them, by number.

    `fixed` holds (label, params) of trials that come first, each once in the life of the study. After `timeout` seconds
    no further trial starts; a running one is not stopped. `options` are those of `driving`.
    """
    with driving(study, tracker, evaluate, **options) as driver:
        driver.enqueue_fixed(fixed)
        start = time.monotonic()

        def room() -> bool:
            in_time = timeout is None or time.monotonic() - start < timeout
            return in_time and len(driver.finished) + len(driver.running) < n_trials

        while driver.sample(room=room) is not None:
            pass
        if room():
            _log.warning("The search space is exhausted: %d of %d trials.", len(driver.finished), n_trials)
        driver.spool.deliver(wait=True)
        return driver.trials
