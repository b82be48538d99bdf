"""A study repairs the float weights before it buys int16, and its result carries them to where it is used."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from support.commands import run_qflow

import qflow
from qflow.tasks.dual import build_model
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # runs studies


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The built-in task that no mix of int8, int16 and fp16 gets through, tuned as shipped."""
    folder = tmp_path_factory.mktemp("dual")
    done = run_qflow("tune", "+experiment=int8_int16", "task=dual", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    tracker = MlflowTracker.open(None, folder / "qflow_out", "dual")
    return folder, done.stdout, tracker, tracker.run_tags(tracker.find_study("dual/int8_int16"))["qflow.best"]


def test_all_int8_meets_the_goal_that_no_mix_meets_without_a_repair(study):
    _, printed, _, _ = study
    rows = dict(re.findall(r"^(all-int8|all-int8 unrepaired) +0\.\d+ +([+-]0\.\d+)", printed, re.MULTILINE))
    assert float(rows["all-int8"]) <= 0.01 and float(rows["all-int8 unrepaired"]) > 0.5
    assert "no operator needs int16" in printed


def test_the_decisions_say_what_was_repaired_why_and_what_it_gave(study):
    folder, _, _, _ = study
    text = (folder / "qflow_out/studies/dual/int8_int16/decision.md").read_text()
    assert re.search(
        r"\*\*repair\*\*: equalize: kept on conv1 .*-> conv2 .* error of the outputs 0\.\d+ -> 0\.0\d+", text
    )
    assert "its result is an output of the model" in text
    assert re.search(
        r"\*\*repair\*\*: kept: drop of all-int8 \+0\.\d+ without it, [+-]0\.\d+ with it \(noise 0\.", text
    )


def test_the_run_holds_the_weights_and_the_table(study, tmp_path):
    _, _, tracker, run = study
    table = json.loads(tracker.download(run, "repair.json", tmp_path).read_text())
    assert [row["verdict"] for row in table["rows"] if row["change"] is not None] == ["kept"]
    weights = load_file(tracker.download(run, "qconfig/weights.safetensors", tmp_path))
    repaired, plain = build_model(), build_model()
    repaired.load_state_dict(weights)
    images = torch.rand(4, 1, 8, 8)
    assert not torch.equal(repaired.conv2.weight, plain.conv2.weight)
    with torch.no_grad():
        assert torch.equal(repaired(images), plain(images)), "the float function is the same, bit for bit"


def test_it_is_loaded_and_run_again_by_hand_bit_by_bit(study):
    folder, _, tracker, run = study
    prepared = qflow.load(f"runs:/{run}", uri=tracker.uri)
    assert not torch.equal(prepared.float_state_dict()["conv2.weight"], build_model().conv2.weight)
    again = run_qflow("trial", f"from_run={run}", "task=dual", cwd=folder)
    assert again.returncode == 0, again.stderr
    scales = {tags["qflow.scales"] for tags in map(tracker.run_tags, [run, *_by_hand(tracker)])}
    assert len(scales) == 1


def _by_hand(tracker):
    return [run for run, number, *_ in tracker.trial_runs("dual/int8_int16") if number < 0]


def test_promote_rebuilds_the_repair_and_registers_its_weights(study):
    folder, _, _, _ = study
    done = run_qflow("promote", "study=dual/int8_int16", "tracking.experiment=dual", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ACCEPT" in done.stdout
    again = run_qflow("tune", "+experiment=int8_int16", "task=dual", cwd=folder)
    assert "3 trials of an earlier start are kept" in again.stdout


def test_a_repair_that_the_metric_contradicts_is_given_up(tmp_path):
    own = ["task=custom", "task.name=contrary", "task.model._target_=support.contrary_task.model"]
    own += ["task.data._target_=support.contrary_task.Data", "task.metric._target_=support.contrary_task.Off"]
    done = run_qflow("tune", "+experiment=int8", *own, "calibration.steps=4", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decision     repair: equalize: kept on" in done.stdout
    assert re.search(r"decision     repair: given up: drop of all-int8 -0\.\d+ without it", done.stdout)
    assert re.search(r"^all-int8 repaired +0\.\d+", done.stdout, re.MULTILINE)
    best = re.search(r"^best mix +(0\.\d+)", done.stdout, re.MULTILINE)[1]
    assert float(best) < 1e-3, "int8 without a repair is what the labels were made of"


def test_steps_are_searched(tmp_path):
    done = run_qflow(
        "tune", "+experiment=int8", "task=dual", "repair.equalize=choice(true,false)", "repair=none",
        "search.n_trials=8", "calibration.method=choice(mse)", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tracker = MlflowTracker.open(None, tmp_path / "qflow_out", "dual")
    best = tracker.run_tags(tracker.find_study("dual/int8"))["qflow.best"]
    assert tracker.run_params(best)["repair.equalize"] == "True"
