"""A study of a detector whose blocks share one activation: what splitting gains is said, tried, kept and rebuilt."""

import json
import re

import pytest
from support.commands import STORE, UNREPAIRED, open_tracker, run_qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own

DETECTOR = [*UNREPAIRED, "task.model._target_=user_task.detector", "objective.max_drop=0.5", "search.n_trials=3"]
ACT = "detector.stem.act"


def test_the_study_names_the_gain_and_keeps_to_its_setting(tmp_path):
    done = run_qflow("tune", *DETECTOR, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.findall(rf"^shared +{ACT}: shared module: (.*)$", done.stdout, re.MULTILINE)
    assert [text.split(" ")[0] for text in said] == ["one", "a"]  # the reach in its check, the error after its layers
    assert "quant.split_shared=auto tries it" in said[0]
    other = run_qflow("tune", *DETECTOR, "quant.split_shared=auto", cwd=tmp_path)
    assert other.returncode == 2
    assert 'quant.split_shared: nothing -> "auto"' in other.stderr


def test_a_split_study_is_rebuilt_from_its_run(tmp_path):
    done = run_qflow("tune", *DETECTOR, "quant.split_shared=[auto]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"^shared ", done.stdout, re.MULTILINE)
    tracker = open_tracker(tmp_path)
    best = tracker.run_tags(tracker.find_study("own/int8_int16"))["qflow.best"]
    read = {
        name: json.loads(tracker.download(best, name, tmp_path / "got").read_text())
        for name in ("qconfig/qconfig.json", "qconfig/scales.json", "manifest.json")
    }
    names = {f"{ACT}({k})" for k in range(1, 18)}
    assert names <= set(read["qconfig/qconfig.json"]["ops"])
    assert names <= set(read["qconfig/scales.json"])
    assert read["manifest.json"]["split_shared"] == ["auto"]
    check = tracker.download(best, "model_check_result.txt", tmp_path / "got").read_text()
    assert check.count("so before it gets the model, write self.act = copy.deepcopy(self.act)") == 1
    promoted = run_qflow("promote", *STORE, cwd=tmp_path)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr


def test_check_refuses_a_name_that_is_no_module(tmp_path):
    done = run_qflow("check", *DETECTOR[1:8], "quant.split_shared=detector.nosuch", cwd=tmp_path)
    assert done.returncode == 2
    assert "quant.split_shared names modules or classes of the model, but got 'detector.nosuch'" in done.stderr
