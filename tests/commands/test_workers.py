"""A study whose trials run in a worker process is the study in one process, number for number."""

import re

import pytest
from support.commands import UNREPAIRED, measured, open_tracker, run_qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own

STUDY = [*UNREPAIRED, "search.n_trials=5", "executor.threads=1"]  # the order of sums follows from the threads


def story(done):
    """Trials and decisions, without seconds."""
    lines = re.findall("^(?:trial|decision) .*", done.stdout, re.MULTILINE)
    return [re.sub(r" +[\d.]+ s( .*)?$", "", line) for line in lines]


def numbers(folder):
    """What the runs of the trials hold, without what a clock decides."""
    found = []
    for metrics, tags in measured(open_tracker(folder)):
        kept = {key: tags[key] for key in ("qflow.qconfig", "qflow.scales", "qflow.evaluated")}
        found.append((metrics, kept))
    return found


@pytest.mark.proof
def test_a_worker_evaluates_the_same_study(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    alone = run_qflow("tune", *STUDY, cwd=here)
    done = run_qflow("tune", *STUDY, "executor=process", "executor.workers=1", cwd=there)
    assert done.returncode == alone.returncode == 0, done.stdout + done.stderr
    assert len(numbers(there)) == 5
    assert numbers(there) == numbers(here)
    assert story(done) == story(alone)
