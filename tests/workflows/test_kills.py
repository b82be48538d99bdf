"""A study that is killed in any of its stages ends, after the same command, as one that was never killed."""

import re
import signal

import pytest
from support.commands import run_qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own

STUDY = [
    "+experiment=full", "task=custom", "task.name=toned", "task.model._target_=support.dark_channel.toned",
    "task.data._target_=support.dark_channel.TonedData", "task.metric._target_=support.dark_channel.BothRight",
    "calibration.steps=4", "executor.threads=1", "objective.max_drop=0.001", "search.n_trials=14",
]  # fmt: skip
KILLED_AFTER = ["all-int8 kl ", " float16_count=2 ", " int16, int16 weights=1 "]
"""Trials of the best calibration of a baseline, of fp16, and of int16 weights beside it; then comes the self-check."""


def story(done):
    """What a study says at its end, and its decisions, without numbers of trials and names of runs."""
    lines = re.findall(r"^((?:decision|goal|tried|not tried|best mix|nearest|all-int).*)", done.stdout, re.MULTILINE)
    return [re.sub(r"trial \d+", "trial", line) for line in lines if not line.startswith("decisions")]


def test_kills_in_the_late_stages_change_nothing(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = run_qflow("tune", *STUDY, cwd=whole)
    assert expected.returncode == 1 and len(story(expected)) > 6, expected.stdout + expected.stderr
    assert "2 mixes with fp16 and int16 weights" in expected.stdout
    for place in KILLED_AFTER:
        killed = run_qflow("tune", *STUDY, cwd=broken, killed_after=place)
        assert killed.returncode == -signal.SIGKILL, place + killed.stdout + killed.stderr
    done = run_qflow("tune", *STUDY, cwd=broken)
    assert done.returncode == expected.returncode
    assert story(done) == story(expected)
