"""The driver of a search: it asks the study for points, has them evaluated, commits the results and tells the study.

An executor evaluates `workers` trials at once; the driver alone asks, tells and writes. Proposal n is asked for when
exactly the trials before number n - workers + 1 are told, and results are committed and told in the order of their
numbers, whichever worker is done first. So a seed and a number of workers give the same study each time, and with one
worker nothing else happens than ask, evaluate, tell. Of the points that a strategy gives, those that do not depend on
each other come at once (`measure_all`).
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qflow.core.errors import TrialError
from qflow.core.stored_text import one_line
from qflow.process.interrupts import Terminated
from qflow.search.attempt import Executor, Running
from qflow.search.domain import NOTHING, Choice, Values, all_points, applies, as_proposed, point_key
from qflow.search.outcome import FailedTrial, FinishedTrial, Marker
from qflow.search.proposal import Proposal
from qflow.search.reconcile import LASTING, finished, given_up
from qflow.search.spool import Record, Spool
from qflow.search.study import Study

ASKS = 30  # proposals in a row that repeat known trials, after which the space counts as exhausted
LISTABLE = 4096  # points; a space with at most so many is listed to find the points that are left
SCREENED = 10  # how many proposals in a row may be screened out
FAILURES = 10  # failed trials in a row that end the search, because the cause is hardly the point then


def _nothing_against(_: Values) -> str:
    return ""


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Begun:
    """A trial that an executor evaluates, with its run and the folder of its files."""

    proposal: Proposal
    run_id: str
    folder: Path
    handle: Running


@dataclass
class Driver:
    """Adds trials to a study: at given points (`measure`) or at the proposals of the sampler (`sample`)."""

    study: Study
    spool: Spool
    executor: Executor
    scratch: Path
    on_trial: Callable[[FinishedTrial | FailedTrial], None]
    checkpoint: Callable[[str], None]
    asked_to_end: threading.Event
    finished: dict[str, FinishedTrial] = field(default_factory=dict)  # by point
    failed: dict[str, FailedTrial] = field(default_factory=dict)  # by point: failed in this process, or given up
    running: deque[Begun] = field(default_factory=deque)  # by number
    failures: int = 0  # in a row
    broken: int = 0  # proposals of the sampler in a row that cannot work, as far as this start goes
    screened: set[str] = field(default_factory=set)  # points that this process screened out
    late_runs: dict[int, str] = field(default_factory=dict)  # by number of trials begun while the store was away

    def __post_init__(self) -> None:
        self.spool.made = self._note_run
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
        """Return the trial at `params`; evaluate it unless the study has it. Points begun or queued come first.

        Raises ValueError if `params` lacks a key that applies: the sampler would choose another value for it each time.
        """
        self.measure_all([])  # what runs
        self.measure_all([(params, label)])
        if (found := self.known(params)) is None:
            raise RuntimeError(f"A queued point must be proposed, but {params} was not.")
        return found

    def measure_all(self, points: Sequence[tuple[Values, str]], room: Callable[[], bool] = _always) -> None:
        """Evaluate points, given with their labels, as many at once as there are workers; return when all are done.

        Their trials have numbers in this order; a point that the study has is left out. None begins while there is no
        `room()`, which may count `running`; the rest is left out if there is none when nothing runs.
        """
        for params, label in points:
            while self.running and (len(self.running) >= self.executor.workers or not room()):
                self._finish()
            if self._number_at(params) is None:
                if not room():
                    break
                self._begin_at(params, label)
        while self.running:
            self._finish()

    def _begin_at(self, params: Values, label: str) -> None:
        """Begin the trial at `params`, after the trials at points that are queued already."""
        point = self.study.point(params)
        absent = [key for key in self.study.space if key not in point]
        left_open = [key for key in absent if applies(self.study.space, key, point, absent)]
        if left_open:
            raise ValueError(f"A point to measure has a value for every key that applies, but lacks {left_open}.")
        self.study.enqueue_once(params, label=label)
        for _ in range(sum(trial.state == "waiting" for trial in self.study.trials())):
            while len(self.running) >= self.executor.workers:
                self._finish()
            self._begin()
            if self._number_at(params) is not None:
                return

    def sample(
        self,
        kept: Values = NOTHING,
        screen: Callable[[Values], str] = _nothing_against,
        inside: Callable[[Values], Values] = as_proposed,
        room: Callable[[], bool] = _always,
    ) -> FinishedTrial | FailedTrial | None:
        """Begin trials until every worker has one or `room()` is false; return the first of them when it is done.

        A trial is at the next queued point, else at the sampler's next proposal. None is returned if none runs: no new
        point is left, or there is no room. `room` may count `running`.

        After `FAILURES` proposals in a row that cannot work (FailedTrial.lasting) none is made any more. In the
        sampler's proposals the values of `kept` replace those of the same keys, and so do those that `inside` returns
        for the proposal. A point for which `screen` returns a reason is not evaluated (Optuna prunes only in studies
        with one objective). At most `SCREENED` points in a row are left out this way, because a sampler learns only
        from evaluated points.
        """
        while len(self.running) < self.executor.workers and room():
            if not self._begin_new(kept, screen, inside):
                break
        if not self.running:
            return None
        trial = self._finish()
        self.broken = self.broken + 1 if isinstance(trial, FailedTrial) and trial.lasting else 0
        return trial

    def stop(self) -> None:
        """Stop what runs, and remove its files; the trials stay open in study and tracker."""
        self.executor.close()
        for begun in self.running:
            shutil.rmtree(begun.folder, ignore_errors=True)

    def _begin_new(self, kept: Values, screen: Callable[[Values], str], inside: Callable[[Values], Values]) -> bool:
        """Begin a trial at a new point; return False if none is left."""
        left_out = len(self.screened)
        for turn in range(ASKS if self.broken < FAILURES else 0):
            against = screen if len(self.screened) - left_out < SCREENED else _nothing_against
            if self._begin(kept, against, inside):
                return True
            if turn >= 3 and not self._enqueue_unseen(kept, screen):
                return False
        return False

    def enqueue_fixed(self, fixed: Sequence[tuple[str, Values]]) -> None:
        """Queue the fixed points that the study does not have yet; a failed one is tried again."""
        settled = {t.label for t in self.study.trials() if t.state != "fail" or t.ending == "twin" or given_up(t)}
        for label, params in fixed:
            if label not in settled:
                self.study.enqueue(params, label=label)
                settled.add(label)

    def _begin(
        self,
        kept: Values = NOTHING,
        screen: Callable[[Values], str] = _nothing_against,
        inside: Callable[[Values], Values] = as_proposed,
    ) -> bool:
        """Begin the trial at the next proposal; return False if its point is known or begun, or `screen` rejects it."""
        if self.asked_to_end.is_set():
            raise Terminated("the process was asked to end")
        proposal = self.study.ask(kept, inside)
        self.checkpoint("asked")
        twin = self._number_at(proposal.params)
        if twin is not None:
            self.study.fail(proposal.number, "twin", f"the same point as trial {twin}")
            return False
        if reason := screen(proposal.params):
            self.study.fail(proposal.number, "screened", reason)
            self.screened.add(point_key(proposal.params))
            return False
        run_id = self.spool.start_trial(proposal.number, proposal.label)
        self.checkpoint("started")
        if run_id:
            self.study.link(proposal.number, run_id)
        self.checkpoint("linked")
        self.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{proposal.number}-", dir=self.scratch))
        self.running.append(Begun(proposal, run_id, folder, self.executor.submit(proposal.params, folder)))
        return True

    def _number_at(self, params: Values) -> int | None:
        """Return the number of the trial at `params` that is known or runs, or None."""
        if (found := self.known(params)) is not None:
            return found.number
        key = point_key(self.study.point(params))
        return next((b.proposal.number for b in self.running if point_key(b.proposal.params) == key), None)

    def _finish(self) -> FinishedTrial | FailedTrial:
        """Wait for the trial that began first; commit and tell it. Raises TrialError after `FAILURES` in a row."""
        begun = self.running[0]
        trial = self._told(begun)
        self.running.popleft()
        shutil.rmtree(begun.folder, ignore_errors=True)
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
        left = [p for p in rest if self._number_at(p) is None and point_key(p) not in self.screened]
        random.Random(len(self.finished) + len(self.failed)).shuffle(left)
        for point in left:
            if not screen(point):
                self.study.enqueue(point)
                return True
            self.screened.add(point_key(point))
        return False

    def _told(self, begun: Begun) -> FinishedTrial | FailedTrial:
        try:
            marker = begun.handle.result()
        except TrialError as error:
            ending = LASTING if error.lasting else "failed"
            return self._fail(begun.proposal, begun.run_id, ending, one_line(str(error)))
        self.checkpoint("evaluated")
        labelled = replace(marker, label=begun.proposal.label)
        try:
            text = labelled.to_json()
        except TrialError as error:
            return self._fail(begun.proposal, begun.run_id, "failed", str(error))
        return self._commit(begun, labelled, text)

    def _commit(self, begun: Begun, marker: Marker, text: str) -> FinishedTrial:
        proposal, number, outcome = begun.proposal, begun.proposal.number, marker.outcome
        self.spool.commit(Record(begun.run_id, number, proposal.label, text, "FINISHED"), begun.folder)
        self.study.set_result(number, outcome.constraints, text)
        self.checkpoint("constrained")
        self.study.complete(number, outcome.objectives)
        run_id = self.late_runs.get(number, begun.run_id)
        done = FinishedTrial(number, run_id, proposal.params, proposal.label, outcome, marker.seconds)
        self.finished[point_key(proposal.params)] = done
        self.checkpoint("told")
        return done

    def _fail(self, proposal: Proposal, run_id: str, ending: str, reason: str) -> FailedTrial:
        self.spool.require_owned()
        self.study.fail(proposal.number, ending, reason)
        self.checkpoint("failed")
        failed = FailedTrial(proposal.number, run_id, proposal.params, proposal.label, reason, ending == LASTING)
        self.failed[point_key(proposal.params)] = failed
        self.spool.commit(Record(run_id, proposal.number, proposal.label, "", "FAILED", reason))
        return failed

    def _note_run(self, number: int, run_id: str) -> None:
        """Note the run of a trial that was begun while the store was away."""
        self.study.link(number, run_id)
        self.late_runs[number] = run_id
        late = {key: replace(trial, run_id=run_id) for key, trial in self.finished.items() if trial.number == number}
        self.finished.update(late)
