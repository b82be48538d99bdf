"""Make study and tracker agree again after a process died between any two steps of a trial.

The commit marker decides: that of a result that waits in the spool, or that on the run. If a trial was committed but
the study has no result, the study gets the result from the marker, and nothing is computed again. If it was not
committed, the trial fails and its point is queued again, at most `MAX_RETRY` times, so that a point that kills its
process cannot block the study for ever. Then every open run is ended with the status of its trial. All this may be
repeated without effect, so it may be killed at any time too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container

from qflow.core.errors import TrackingError
from qflow.search.outcome import FinishedTrial, Marker, Tracker
from qflow.search.proposal import StudyTrial
from qflow.search.spool import Spool
from qflow.search.study import Study

MAX_RETRY = 2
LOST = "lost"  # the process died; this counts as a try
LASTING = "lasting"  # the point itself is the cause (TrialError.lasting in core/errors.py)
INTERRUPTED = "interrupted"  # the user stopped it; this does not count
_REASONS = {LOST: "the process ended before the trial was committed", INTERRUPTED: "stopped by the user"}
_log = logging.getLogger(__name__)


def reconcile(study: Study, tracker: Tracker, spool: Spool, *, ending: str = LOST) -> list[int]:
    """Complete or fail every running trial and end every open run; return the numbers of those that were completed.

    A trial that waits in the spool is ended with its delivery. One that the study ended otherwise is set aside.

    The caller must hold `study.driver()`, or a trial of a process that still runs would be taken for a lost one.
    """
    recovered, kept = [], spool.trials()
    for trial in study.trials():
        if trial.state == "running":
            run_id, text = trial.run_id or "", kept[trial.number].marker if trial.number in kept else None
            if not text:
                run_id = run_id or tracker.find_trial(study.name, trial.number) or ""
                text = tracker.result(run_id) if run_id else None
            if text:
                _complete(study, trial, run_id, text)
                recovered.append(trial.number)
            else:
                _requeue(study, trial, ending)
    states = {trial.number: trial for trial in study.trials()}
    for number, record in kept.items():
        found = states.get(number)
        if found is None or found.state != ("complete" if record.marker else "fail"):
            spool.set_aside(number, "the study has no such trial, or ended it and tried its point again")
    _close_runs(study, tracker, spool.trials())
    return recovered


def finished(trial: StudyTrial) -> FinishedTrial:
    """Return the record of a complete trial, read from its marker."""
    marker = Marker.from_json(trial.marker or "{}")
    return FinishedTrial(trial.number, trial.run_id or "", trial.params, trial.label, marker.outcome, marker.seconds)


def given_up(trial: StudyTrial) -> bool:
    """Return whether the trial is not tried again, because it was lost too often or would fail again."""
    return trial.ending == LASTING or (trial.ending == LOST and trial.attempt >= MAX_RETRY)


def _complete(study: Study, trial: StudyTrial, run_id: str, text: str) -> None:
    marker = Marker.from_json(text)
    if trial.run_id is None and run_id:
        study.link(trial.number, run_id)
    study.set_result(trial.number, marker.outcome.constraints, text)
    study.complete(trial.number, marker.outcome.objectives)


def _requeue(study: Study, trial: StudyTrial, ending: str) -> None:
    study.fail(trial.number, ending, _REASONS[ending])
    attempt = trial.attempt + (ending == LOST)
    if attempt > MAX_RETRY:
        _log.warning("Trial %d was lost %d times and is given up: %s", trial.number, attempt, dict(trial.params))
    elif trial.params or trial.label:  # a trial killed right after ask has no point yet to queue again
        study.enqueue(trial.params, label=trial.label, attempt=attempt, retry_of=trial.number)


def _close_runs(study: Study, tracker: Tracker, kept: Container[int]) -> None:
    """End the open runs of the study, but not of trials that wait in the spool (`kept`).

    One that cannot be ended is said and left, because it must not block a start.
    """
    trials = {trial.number: trial for trial in study.trials()}
    left_open: dict[str, str] = {}
    for run_id in tracker.running_trials(study.name):
        number = tracker.run_tags(run_id).get("qflow.trial", "")
        if number.startswith("-") or int(number or -1) in kept:  # a trial by hand, whose own process ends it
            continue
        trial = trials.get(int(number or -1))
        try:
            if trial is None:
                tracker.end(run_id, "KILLED", "its trial is not in the study database")
            elif trial.state == "complete":
                tracker.end(run_id, "FINISHED")
            else:
                status = "KILLED" if trial.ending in (LOST, INTERRUPTED) else "FAILED"
                tracker.end(run_id, status, trial.reason)
        except TrackingError as error:
            left_open[run_id] = str(error)
    if left_open:
        runs, why = ", ".join(left_open), next(iter(left_open.values()))
        _log.warning("Runs that stay open, because the store refused to end them: %s. %s", runs, why)


def check_invariants(study: Study, tracker: Tracker) -> list[str]:
    """Return one sentence for each disagreement of study and tracker; no process may drive the study meanwhile."""
    runs: dict[int, list[tuple[str, str, str | None]]] = {}
    problems = []
    for run_id, number, status, marker in tracker.trial_runs(study.name):
        if number < 0:  # a trial by hand
            continue
        runs.setdefault(number, []).append((run_id, status, marker))
        if status == "RUNNING":
            problems.append(f"Run {run_id} of trial {number} is RUNNING.")
    trials = study.trials()
    for number, found in runs.items():
        if number >= len(trials) and any(marker for *_, marker in found):
            problems.append(f"Trial {number} has a result in run {found[0][0]}, and the study has no such trial.")
    for trial in trials:
        if trial.state == "running":
            problems.append(f"Trial {trial.number} is running.")
        elif trial.state == "complete":
            problems += _check_complete(trial, runs.get(trial.number, []))
        elif any(status == "FINISHED" or marker for _, status, marker in runs.get(trial.number, [])):
            problems.append(f"Trial {trial.number} is {trial.state} but has a FINISHED run, or one with a result.")
    return problems


def _check_complete(trial: StudyTrial, runs: list[tuple[str, str, str | None]]) -> list[str]:
    ended = [(run_id, marker) for run_id, status, marker in runs if status == "FINISHED"]
    if len(ended) != 1 or len(runs) != 1:
        return [f"Trial {trial.number} is complete and has {len(runs)} runs, {len(ended)} of them FINISHED."]
    run_id, text = ended[0]
    if text is None or run_id != trial.run_id:
        return [f"Trial {trial.number} and run {run_id} do not name each other with a marker."]
    outcome = Marker.from_json(text).outcome
    problems = []
    if text != trial.marker or tuple(outcome.objectives) != trial.objectives:
        problems.append(f"Trial {trial.number} has {trial.objectives}, its run {outcome.objectives}.")
    if dict(outcome.constraints) != dict(trial.constraints):
        problems.append(f"Trial {trial.number} has {trial.constraints}, its run {outcome.constraints}.")
    if not all(math.isfinite(value) for value in trial.objectives):
        problems.append(f"Trial {trial.number} is complete with {trial.objectives}.")
    return problems
