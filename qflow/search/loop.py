"""The loop of a search: ask, start a run, evaluate, commit, tell.

    ask -> start run -> link -> evaluate -> upload files -> constraints -> COMMIT -> tell -> end run

This process is the only writer. Up to the commit a trial can be lost and is tried again; from the commit on
its result can no longer be lost, whatever is killed when (`reconcile`). Running the same search again
continues it: a point that was measured is not measured again, so a search is written as if it ran in one go.

What it leaves out: several trials at once, and stopping a trial that has begun.
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
from types import MappingProxyType
from typing import Any, TypeAlias
from urllib.parse import quote

from qflow.core.errors import QflowError, TrialError
from qflow.search.domain import Choice, Scalar, Values, all_points, applies, point_key
from qflow.search.interrupts import Terminated, interrupts
from qflow.search.outcome import FailedTrial, FinishedTrial, Marker, Outcome, Tracker
from qflow.search.reconcile import INTERRUPTED, LASTING, LOST, check_invariants, finished, given_up, reconcile
from qflow.search.study import Proposal, Study

__all__ = [
    "Driver", "Evaluate", "FailedTrial", "FinishedTrial", "Outcome", "Scalar", "Terminated", "Tracker",
    "check_invariants", "driving", "interrupts", "reconcile", "run_trials",
]  # fmt: skip

Evaluate: TypeAlias = Callable[[Values, Path], Outcome]
ASKS = 30  # proposals in a row that repeat known trials before the space counts as exhausted
LISTABLE = 4096  # points; a smaller space is listed to find what is left of it
SCREENED = 10  # proposals in a row that are left out unevaluated
FAILURES = 10  # failed trials in a row that end the search: by then the cause is not the point
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
    study_run_id: str | None = None,
    checkpoint: Callable[[str], None] = _nothing,
) -> Iterator[Driver]:  # fmt: skip
    """Drive the study: settle what an earlier process left, then measure points until the block ends.

    `evaluate(params, folder)` writes the trial's files into the folder; a QflowError from it fails that trial only,
    anything else ends the search after the trial was marked as failed. Interrupted (Ctrl-C, SIGTERM), the trial at
    hand is put back and the interrupt goes on. `checkpoint` is called with the name of each step that was just done.
    Raises TrackingError when another process drives the study, TrialError after `FAILURES` failures in a row.
    """
    parent = study_run_id or tracker.open_study(study.name, tags={}, params={}, description="")
    with interrupts() as asked_to_end, study.driver():
        folder = scratch / quote(study.name, safe="")
        shutil.rmtree(folder, ignore_errors=True)  # of a driver that was killed
        for trial in reconcile(study, tracker):
            on_trial(trial)
        try:
            yield Driver(study, tracker, evaluate, parent, folder, on_trial, checkpoint, asked_to_end)
        except BaseException as error:
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            with suppress(Exception):  # what is left open now is settled by the next start
                reconcile(study, tracker, ending=INTERRUPTED if stopped else LOST)
            raise


def run_trials(
    study: Study, tracker: Tracker, evaluate: Evaluate, *,
    n_trials: int,
    fixed: Sequence[tuple[str, Values]] = (),
    timeout: float | None = None,
    **options: Any,
) -> list[FinishedTrial]:  # fmt: skip
    """Drive until the study has `n_trials` finished trials; returns all of them, by number.

    `fixed` are (label, params) that come first, each once in the life of the study. `timeout` (seconds) stops
    before the next trial, not within one. `options` are those of `driving`.
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
    """The right to add trials to a study: by point (`measure`) or as the sampler proposes (`sample`)."""

    study: Study
    tracker: Tracker
    evaluate: Evaluate
    parent: str
    scratch: Path
    on_trial: Callable[[FinishedTrial | FailedTrial], None]
    checkpoint: Callable[[str], None]
    asked_to_end: threading.Event
    finished: dict[str, FinishedTrial] = field(default_factory=dict)  # by point
    failed: dict[str, FailedTrial] = field(default_factory=dict)  # in this process, or given up
    failures: int = 0  # in a row
    screened: set[str] = field(default_factory=set)  # points that were refused unevaluated, in this process

    def __post_init__(self) -> None:
        for trial in self.study.trials():
            key = point_key(trial.params)
            if trial.state == "complete":
                self.finished[key] = finished(trial)
            elif given_up(trial):
                run = trial.run_id or ""
                self.failed[key] = FailedTrial(trial.number, run, trial.params, trial.label, trial.reason)

    @property
    def trials(self) -> list[FinishedTrial]:
        """All finished trials of the study, by number."""
        return sorted(self.finished.values(), key=lambda trial: trial.number)

    def known(self, params: Values) -> FinishedTrial | FailedTrial | None:
        """What `params` came to, if they were measured."""
        key = point_key(self.study.point(params))
        return self.finished.get(key) or self.failed.get(key)

    def measure(self, params: Values, label: str = "") -> FinishedTrial | FailedTrial:
        """The trial at `params`, evaluated unless the study has it; what an earlier process left queued comes first.

        Raises ValueError where `params` leave a key open that applies: the sampler would fill it anew at each asking.
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
        raise RuntimeError(f"A point that was queued comes to its turn, but {point} did not.")

    def sample(
        self, kept: Values = MappingProxyType({}), screen: Callable[[Values], str] = _nothing_against
    ) -> FinishedTrial | FailedTrial | None:
        """The sampler's next trial, what is queued before it; None where the space is used up.

        The sampler's own points get the values of `kept`, whatever it proposes for these keys. A point against which
        `screen` has a reason is not evaluated (optuna prunes studies of one objective only), but at most `SCREENED`
        in a row: a sampler learns only from what is evaluated.
        """
        left_out = len(self.screened)
        for turn in range(ASKS):
            trial = self._next(kept, screen if len(self.screened) - left_out < SCREENED else _nothing_against)
            if trial is not None:
                return trial
            if turn >= 3 and not self._enqueue_unseen(kept, screen):
                return None
        return None

    def enqueue_fixed(self, fixed: Sequence[tuple[str, Values]]) -> None:
        """Put the fixed points in the queue that are not in the study yet; a failed one gets a new try."""
        settled = {t.label for t in self.study.trials() if t.state != "fail" or t.ending == "twin" or given_up(t)}
        for label, params in fixed:
            if label not in settled:
                self.study.enqueue(params, label=label)
                settled.add(label)

    def _next(
        self, kept: Values = MappingProxyType({}), screen: Callable[[Values], str] = _nothing_against
    ) -> FinishedTrial | FailedTrial | None:
        """Evaluate the next proposal; None where it repeats a point that is known or is refused by `screen`."""
        if self.asked_to_end.is_set():
            raise Terminated("asked to end")
        proposal = self.study.ask(kept)
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
        self.failures = self.failures + 1 if isinstance(trial, FailedTrial) else 0
        if self.failures >= FAILURES and isinstance(trial, FailedTrial):
            raise TrialError(
                f"A search goes on while some trials succeed, but got {self.failures} failures in a row, the "
                f"last: {trial.reason} Mend the cause and run the same command again."
            )
        return trial

    def _enqueue_unseen(self, kept: Values, screen: Callable[[Values], str]) -> bool:
        """Queue a point that is left of a small space and has nothing against it; False when none is."""
        space = {k: Choice((kept[k],), when=d.when) if k in kept else d for k, d in self.study.space.items()}
        points = all_points(space, LISTABLE)
        if points is None:
            return True  # too many to list: there may be some
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
        marker.to_json()  # refuses what cannot be kept before anything is written
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
        failed = FailedTrial(proposal.number, run_id, proposal.params, proposal.label, reason)
        self.failed[point_key(proposal.params)] = failed
        self.tracker.end(run_id, "FAILED", reason)
        return failed
