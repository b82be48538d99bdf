"""Runs that one process writes by itself: they end with it, or after its kill with the next one."""

import os
import signal
from contextlib import nullcontext

import pytest
from support.harness import Harness

from qflow.core.errors import TrackingError
from qflow.tracking.ended import end_abandoned, own_runs


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", None),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (TrackingError("It is full."), "FAILED", "It is full."),
    ],
)
def test_a_run_ends_however_its_block_ends(tracker, error, status, reason):
    other = tracker.open_study("other", tags={}, params={}, description="")
    with nullcontext() if error is None else pytest.raises(type(error)), own_runs(tracker):
        run = tracker.open_study("s", tags={}, params={}, description="")
        if error is not None:
            raise error
    assert tracker.client.get_run(run).info.status == status
    assert tracker.run_tags(run).get("qflow.end_reason") == reason
    assert tracker.client.get_run(other).info.status == "RUNNING"


def test_an_interrupt_right_after_a_run_was_made_leaves_it_ended(tracker, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tracker, "_new_params", interrupted)
    with pytest.raises(KeyboardInterrupt), own_runs(tracker):
        tracker.open_study("s", tags={}, params={}, description="")
    assert tracker.client.get_run(tracker.find_study("s")).info.status == "KILLED"


def test_an_interrupt_while_a_run_is_ended_leaves_it_ended(tracker, monkeypatch):
    def interrupted(run, status, *_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    def written():
        with own_runs(tracker):
            tracker.open_study("s", tags={}, params={}, description="")
            monkeypatch.setattr(tracker, "end", interrupted)

    with pytest.raises(KeyboardInterrupt):
        written()
    assert tracker.client.get_run(tracker.find_study("s")).info.status == "KILLED"


def test_what_a_killed_process_has_left_is_ended_by_the_next_one(tmp_path):
    if not (child := os.fork()):
        tracker = Harness(tmp_path).tracker
        with own_runs(tracker):
            study = tracker.open_study("s", tags={}, params={}, description="")
            committed = tracker.start_trial(study, "s", -1, "by hand")
            tracker.commit(committed, "{}", {}, {}, {})
            tracker.start_trial(study, "s", -2, "by hand")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    tracker = Harness(tmp_path).tracker
    assert len(tracker.running_trials("s")) == 2
    with own_runs(tracker):
        mine = tracker.open_study("mine", tags={}, params={}, description="")
        assert len(tracker.running_trials("s")) == 0
        end_abandoned(tracker)
        assert tracker.client.get_run(mine).info.status == "RUNNING"
    assert tracker.client.get_run(tracker.find_study("s")).info.status == "KILLED"
    assert {number: status for _, number, status, _ in tracker.trial_runs("s")} == {-1: "FINISHED", -2: "KILLED"}
