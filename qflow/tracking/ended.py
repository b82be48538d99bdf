"""Runs that one process writes by itself: they end however its block ends, and after a kill by the next such process.

The runs of a search have an owner instead (tracking/lease.py), and its next start ends them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from qflow.core.errors import QflowError, TrackingError
from qflow.core.record import from_dict, to_json
from qflow.process.running import Process, is_running, this_process
from qflow.tracking.lease import claims_of
from qflow.tracking.mlflow_tracker import RESULT, MlflowTracker

PROCESS = "qflow.process"
"""Tag of a run: the process that writes it by itself."""


def own_running(tracker: MlflowTracker) -> dict[str, dict[str, str]]:
    """Return run id -> tags of the runs of the experiment that a process writes, or wrote, by itself."""
    with tracker.calling() as client:
        query = f"attributes.status = 'RUNNING' and tags.`{PROCESS}` LIKE '%'"
        return {run.info.run_id: run.data.tags for run in client.search_runs([tracker.experiment_id], query)}


def abandoned(tags: Mapping[str, str]) -> bool:
    """Return whether the process that wrote a run by itself is known to have ended, and no search has taken it over."""
    taken = any(is_running(claim.process) is not False for claim in claims_of(dict(tags)))
    return has_ended(tags.get(PROCESS, "")) and not taken


def has_ended(text: str) -> bool:
    """Return whether the process of a tag is known to have ended; False for one of another host, or another text."""
    try:
        return is_running(from_dict(Process, json.loads(text))) is False
    except (ValueError, TypeError, QflowError):
        return False


def end_abandoned(tracker: MlflowTracker) -> None:
    """End the runs of the experiment that killed processes have left: FINISHED if the result was committed."""
    for run, tags in own_running(tracker).items():
        if abandoned(tags):
            tracker.end(run, "FINISHED" if RESULT in tags else "KILLED", "its process has ended")


@contextmanager
def own_runs(tracker: MlflowTracker) -> Iterator[dict[str, str]]:
    """End what this process writes by itself with the block; yield the tag of such a run that exists already.

    Every run that is made in the block, or opened again with this tag, is FINISHED at its end, KILLED by Ctrl-C or
    SIGTERM at any moment, and FAILED with the reason by another error. What killed processes have left is ended first.
    """
    end_abandoned(tracker)
    tag, source = {PROCESS: to_json(this_process())}, tracker.source
    tracker.source = {**source, **tag}
    try:
        yield tag
        _end(tracker, tag, "FINISHED")
    except BaseException as error:
        reason = str(error) if isinstance(error, QflowError) else type(error).__name__
        with suppress(TrackingError):  # the first error is the one to report
            _end(tracker, tag, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason)
        raise
    finally:
        tracker.source = source


def _end(tracker: MlflowTracker, tag: Mapping[str, str], status: str, reason: str | None = None) -> None:
    for run, tags in own_running(tracker).items():
        if tag.items() <= tags.items():
            committed = RESULT in tags  # an interrupt after that came too late
            tracker.end(run, "FINISHED" if committed else status, None if committed else reason)
