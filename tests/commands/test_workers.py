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


def tables(folder):
    """The bad cases and the ranking of the study, which several workers share."""
    found = [sorted(folder.rglob(name)) for name in ("badcase_record.json", "sensitivity.json")]
    assert all(found)
    return [{file.read_text() for file in files} for files in found]


@pytest.mark.proof
def test_workers_evaluate_the_same_study(tmp_path):
    here, there, two = tmp_path / "here", tmp_path / "there", tmp_path / "two"
    for folder in (here, there, two):
        folder.mkdir()
    alone = run_qflow("tune", *STUDY, cwd=here)
    done = run_qflow("tune", *STUDY, "executor=process", "executor.workers=1", cwd=there)
    assert done.returncode == alone.returncode == 0, done.stdout + done.stderr
    assert len(numbers(there)) == 5
    assert numbers(there) == numbers(here)
    assert story(done) == story(alone)
    done = run_qflow("tune", *STUDY, "executor=process", "executor.workers=2", cwd=two)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "computed by the study's own process" not in done.stdout
    assert tables(two) == tables(here)
