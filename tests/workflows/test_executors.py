"""A study in worker processes is the study of one process, and the death of a worker is a reason."""

import re

import pytest
from support.commands import UNREPAIRED, open_tracker, run_qflow

pytestmark = pytest.mark.slow  # starts commands and worker processes

STUDY = [
    *UNREPAIRED, "executor.threads=1", "objective.max_drop=0.01", "search.n_trials=4",
    "task.model._target_=user_task.untrained",
]  # fmt: skip


def trials(folder):
    """(number, status, metrics) of every trial's run."""
    tracker = open_tracker(folder)
    runs = sorted(tracker.trial_runs("own/int8_int16"), key=lambda run: run[1])
    return [(number, status, tracker.run_metrics(run)) for run, number, status, _ in runs]


def test_worker_processes_give_the_numbers_of_one_process(tmp_path):
    found = []
    for name, options in (("serial", []), ("process", ["executor=process", "executor.workers=1"])):
        folder = tmp_path / name
        folder.mkdir()
        done = run_qflow("tune", *STUDY, *options, cwd=folder)
        assert done.returncode in (0, 1), done.stdout + done.stderr
        found.append(trials(folder))
    assert len(found[0]) >= 2
    assert found[0] == found[1]


def test_a_worker_that_dies_fails_its_trial_with_the_reason(tmp_path):
    options = ["executor=process", "executor.max_retries=0", "task.metric._target_=user_task.DyingMetric"]
    done = run_qflow("tune", *STUDY, *options, cwd=tmp_path)
    assert re.search(r"trial 0 all-int16 +failed: A worker lives until .* but got exit code 7, 1 times", done.stdout)
    assert "A study needs its baseline all-int16" in done.stderr
    assert [status for _, status, _ in trials(tmp_path)] == ["FAILED"]
