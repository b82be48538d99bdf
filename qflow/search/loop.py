"""The loop of a search: ask the study for a point, evaluate it in a run, commit the result, tell the study.

    ask -> start run -> link -> evaluate -> upload files -> constraints -> COMMIT -> tell -> end run

Only one process writes to a study. If it is killed before the commit, the trial is lost and is tried again; after the
commit the result cannot be lost (reconcile.py). Starting the same search again continues it: points that were measured
are not measured again, so the code of a search need not handle interruptions.

The loop neither runs several trials at once nor stops a trial that has begun.
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from qflow.core.errors import QflowError, TrialError
from qflow.process.interrupts import Terminated, interrupts
from qflow.search.domain import NOTHING, Choice, Values, all_points, applies, as_proposed, point_key
from qflow.search.outcome import FailedTrial, FinishedTrial, Marker, Outcome, Tracker
from qflow.search.proposal import Proposal
from qflow.search.reconcile import INTERRUPTED, LASTING, LOST, finished, given_up, reconcile
from qflow.search.study import Study

Evaluate: TypeAlias = Callable[[Values, Path], Outcome]
ASKS = 30  # proposals in a row that repeat known trials, after which the space counts as exhausted
LISTABLE = 4096  # points; a space with at most so many is listed to find the points that are left
SCREENED = 10  # how many proposals in a row may be screened out
FAILURES = 10  # failed trials in a row that end the search, because the cause is hardly the point then
_log = logging.getLogger(__name__)


def _nothing(_: object) -> None:
    pass


def _nothing_against(_: Values) -> str:
    return ""


@contextmanager
def driving(
    study: Study, tracker: Tracker, evaluate: Evaluate, *,
    scratch: Path,
    on_trial: Callable[[FinishedTrial | FailedTrial], None] = _nothing,
    open_run: Callable[[], str] | None = None,
    checkpoint: Callable[[str], None] = _nothing,
) -> Iterator[Driver]:  # fmt: skip
    """Open the study for new trials: take its lock, reconcile what an earlier process left, yield the driver.

    `open_run` then returns the MLflow run that the trials' runs belong to; it is called under the lock, before anything
    is written for this start, and may refuse the start.
    `evaluate(params, folder)` writes the trial's files into the folder. A QflowError from it fails this trial only; any
    other exception marks the trial as failed and ends the search. On Ctrl-C or SIGTERM the running trial is queued
    again and the interrupt propagates. `checkpoint` is called with the name of each step that was just done.
    Raises TrackingError if another process drives the study, TrialError after `FAILURES` failures in a row.
    """
    with interrupts() as asked_to_end, study.driver():
        folder = scratch / quote(study.name, safe="")
        shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        recovered = reconcile(study, tracker)
        parent = open_run() if open_run else tracker.open_study(study.name, tags={}, params={}, description="")
        for trial in recovered:
            on_trial(trial)
        try:
            yield Driver(study, tracker, evaluate, parent, folder, on_trial, checkpoint, asked_to_end)
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            with suppress(Exception):  # what stays open here, the next start reconciles
                reconcile(study, tracker, ending=INTERRUPTED if stopped else LOST)
            raise


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
        while len(driver.finished) < n_trials and (timeout is None or time.monotonic() - start < timeout):
            if driver.sample() is None:
                _log.warning("The search space is exhausted: %d of %d trials.", len(driver.finished), n_trials)
                break
        return driver.trials


@dataclass
class Driver:
    """Adds trials to a study: at given points (`measure`) or at the proposals of the sampler (`sample`)."""

    study: Study
    tracker: Tracker
    evaluate: Evaluate
    parent: str
    scratch: Path
    on_trial: Callable[[FinishedTrial | FailedTrial], None]
    checkpoint: Callable[[str], None]
    asked_to_end: threading.Event
    finished: dict[str, FinishedTrial] = field(default_factory=dict)  # by point
    failed: dict[str, FailedTrial] = field(default_factory=dict)  # by point: failed in this process, or given up
    failures: int = 0  # in a row
    broken: int = 0  # proposals of the sampler in a row that cannot work, as far as this start goes
    screened: set[str] = field(default_factory=set)  # points that this process screened out

    def __post_init__(self) -> None:
        for trial in self.study.trials():
            key = point_key(trial.params)
            if trial.state == "complete":
                self.finished[key] = finished(trial)
            elif given_up(trial):
                run = trial.run_id or ""
                lasting = trial.ending == LASTING
                self.failed[key] = FailedTrial(trial.number, run, trial.params, trial.label, trial.reason, lasting)

    @property
    def trials(self) -> list[FinishedTrial]:
        """All finished trials of the study, by number."""
        return sorted(self.finished.values(), key=lambda trial: trial.number)

    def known(self, params: Values) -> FinishedTrial | FailedTrial | None:
        """Return the trial at `params`, or None if this point was not measured."""
        key = point_key(self.study.point(params))
        return self.finished.get(key) or self.failed.get(key)

    def measure(self, params: Values, label: str = "") -> FinishedTrial | FailedTrial:
        """Return the trial at `params`; evaluate it unless the study has it. Points queued earlier are evaluated first.

        Raises ValueError if `params` lacks a key that applies: the sampler would choose another value for it each time.
        """
        found = self.known(params)
        if found is not None:
            return found
        point = self.study.point(params)
        absent = [key for key in self.study.space if key not in point]
        left_open = [key for key in absent if applies(self.study.space, key, point, absent)]
        if left_open:
            raise ValueError(f"A point to measure has a value for every key that applies, but lacks {left_open}.")
        self.study.enqueue_once(params, label=label)
        for _ in range(sum(trial.state == "waiting" for trial in self.study.trials())):
            self._next()
            if (found := self.known(params)) is not None:
                return found
        raise RuntimeError(f"A queued point must be proposed, but {point} was not.")

    def sample(
        self,
        kept: Values = NOTHING,
        screen: Callable[[Values], str] = _nothing_against,
        inside: Callable[[Values], Values] = as_proposed,
    ) -> FinishedTrial | FailedTrial | None:
        """Evaluate the next queued point, else the sampler's next proposal; return None if no new point is left.

        After `FAILURES` proposals in a row that cannot work (FailedTrial.lasting) none is made any more. In the
        sampler's proposals the values of `kept` replace those of the same keys, and so do those that `inside` returns
        for the proposal. A point for which `screen` returns a reason is not evaluated (Optuna prunes only in studies
        with one objective). At most `SCREENED` points in a row are left out this way, because a sampler learns only
        from evaluated points.
        """
        left_out = len(self.screened)
        for turn in range(ASKS if self.broken < FAILURES else 0):
            against = screen if len(self.screened) - left_out < SCREENED else _nothing_against
            trial = self._next(kept, against, inside)
            if trial is not None:
                self.broken = self.broken + 1 if isinstance(trial, FailedTrial) and trial.lasting else 0
                return trial
            if turn >= 3 and not self._enqueue_unseen(kept, screen):
                return None
        return None

    def enqueue_fixed(self, fixed: Sequence[tuple[str, Values]]) -> None:
        """Queue the fixed points that the study does not have yet; a failed one is tried again."""
        settled = {t.label for t in self.study.trials() if t.state != "fail" or t.ending == "twin" or given_up(t)}
        for label, params in fixed:
            if label not in settled:
                self.study.enqueue(params, label=label)
                settled.add(label)

    def _next(
        self,
        kept: Values = NOTHING,
        screen: Callable[[Values], str] = _nothing_against,
        inside: Callable[[Values], Values] = as_proposed,
    ) -> FinishedTrial | FailedTrial | None:
        """Evaluate the next proposal; return None if its point is known already or `screen` rejects it."""
        if self.asked_to_end.is_set():
            raise Terminated("the process was asked to end")
        proposal = self.study.ask(kept, inside)
        self.checkpoint("asked")
        twin = self.known(proposal.params)
        if twin is not None:
            self.study.fail(proposal.number, "twin", f"the same point as trial {twin.number}")
            return None
        if reason := screen(proposal.params):
            self.study.fail(proposal.number, "screened", reason)
            self.screened.add(point_key(proposal.params))
            return None
        trial = self._trial(proposal)
        self.on_trial(trial)
        if not isinstance(trial, FailedTrial):
            self.failures = 0
        elif not trial.lasting:  # a point that cannot work says nothing of the others
            self.failures += 1
        if self.failures >= FAILURES and isinstance(trial, FailedTrial):
            raise TrialError(
                f"A search goes on while some trials succeed, but got {self.failures} failures in a row, the "
                f"last: {trial.reason} Remove the cause and run the same command again."
            )
        return trial

    def _enqueue_unseen(self, kept: Values, screen: Callable[[Values], str]) -> bool:
        """Queue a point of a small space that is not measured and not screened out; return False if there is none."""
        space = {k: Choice((kept[k],), when=d.when) if k in kept else d for k, d in self.study.space.items()}
        points = all_points(space, LISTABLE)
        if points is None:
            return True  # too many points to list: some may be left
        rest = (self.study.point({**p, **kept}) for p in points)
        left = [p for p in rest if self.known(p) is None and point_key(p) not in self.screened]
        random.Random(len(self.finished) + len(self.failed)).shuffle(left)
        for point in left:
            if not screen(point):
                self.study.enqueue(point)
                return True
            self.screened.add(point_key(point))
        return False

    def _trial(self, proposal: Proposal) -> FinishedTrial | FailedTrial:
        number = proposal.number
        run_id = self.tracker.start_trial(self.parent, self.study.name, number, proposal.label)
        self.checkpoint("started")
        self.study.link(number, run_id)
        self.checkpoint("linked")
        self.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{number}-", dir=self.scratch) as name:
            try:
                marker = self._measure(proposal, Path(name))
            except QflowError as error:
                lasting = isinstance(error, TrialError) and error.lasting
                return self._fail(proposal, run_id, LASTING if lasting else "failed", str(error))
            except Exception as error:
                self._fail(proposal, run_id, "failed", f"{type(error).__name__}: {error}")
                raise
            self.checkpoint("evaluated")
            return self._commit(proposal, run_id, marker, Path(name))

    def _measure(self, proposal: Proposal, folder: Path) -> Marker:
        start = time.monotonic()
        outcome = self.evaluate(proposal.params, folder)
        outcome.check(len(self.study.directions))
        marker = Marker(outcome, proposal.label, round(time.monotonic() - start, 3))
        marker.to_json()  # raises before anything is written if the outcome cannot be stored
        return marker

    def _commit(self, proposal: Proposal, run_id: str, marker: Marker, folder: Path) -> FinishedTrial:
        number, outcome, text = proposal.number, marker.outcome, marker.to_json()
        tables = self.tracker.upload(run_id, folder)
        self.checkpoint("uploaded")
        self.study.set_result(number, outcome.constraints, text)
        self.checkpoint("constrained")
        self.tracker.commit(run_id, text, outcome.params, outcome.metrics, outcome.tags, None, tables)
        self.checkpoint("committed")
        self.study.complete(number, outcome.objectives)
        done = FinishedTrial(number, run_id, proposal.params, proposal.label, outcome, marker.seconds)
        self.finished[point_key(proposal.params)] = done
        self.checkpoint("told")
        self.tracker.end(run_id, "FINISHED")
        self.checkpoint("ended")
        return done

    def _fail(self, proposal: Proposal, run_id: str, ending: str, reason: str) -> FailedTrial:
        self.study.fail(proposal.number, ending, reason)
        self.checkpoint("failed")
        lasting = ending == LASTING
        failed = FailedTrial(proposal.number, run_id, proposal.params, proposal.label, reason, lasting)
        self.failed[point_key(proposal.params)] = failed
        self.tracker.end(run_id, "FAILED", reason)
        return failed
