"""A study that starts from the user's present mix: measured right after the baselines, and the one to beat."""

import re

import pytest
from support.commands import FREE_BOUNDARIES, run_qflow

from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # starts commands as processes of their own

DISTRACTED = ["task=custom", "task.name=distracted", "task.model._target_=tree_tasks.distracted",
              "task.data._target_=tree_tasks.Angles", "task.metric._target_=tree_tasks.SecondOff",
              "calibration.steps=4", "objective.max_drop=0.01", "repair=none", "executor.threads=1",
              "+experiment=int8_int16", FREE_BOUNDARIES]  # fmt: skip
MIX = """OPERATORS = {
    'loud': dict(output=qint16, weight=qint8), '[mul](2)': dict(output=qint16), '[sin](1)': dict(output=qint16),
    '[mul]': dict(output=qint8), '[sin]': dict(output=qint8), 'quant[x]': dict(output=qint16), 'gone': dict(output=qint8),
}
"""  # noqa: E501


def start_run(folder):
    tracker = MlflowTracker.open(None, folder / "qflow_out", "distracted")
    runs = [run for run, *_ in tracker.trial_runs("distracted/int8_int16")]
    (found,) = [run for run in runs if tracker.run_tags(run)["qflow.label"] == "start"]
    return tracker, found


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    (folder / "qconfig_j6m.py").write_text(MIX)
    return folder, run_qflow("tune", *DISTRACTED, "search.n_trials=8", "search.start=qconfig_j6m.py", cwd=folder)


def test_the_mix_is_the_first_trial_after_the_baselines_and_the_end_compares_with_it(started):
    folder, done = started
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout
    assert "start        qconfig_j6m.py, exported mix: 6 of 7 operators; they give no scales" in out
    assert re.search(r"^ +not in the model: gone$", out, re.MULTILINE)
    assert re.search(r"^ +not in the file: \[mul\]\(1\)$", out, re.MULTILINE)
    labels = re.findall(r"^trial \d+ (all-int16|all-int8|start)", out, re.MULTILINE)
    assert labels[-1] == "start" and set(labels[:-1]) == {"all-int16", "all-int8"}
    assert re.search(r"^decision +start: your mix \(qconfig_j6m.py\) is the one to beat: drop", out, re.MULTILINE)
    assert re.search(r"^your mix +0\.\d+ ", out, re.MULTILINE)
    beaten = r"^your mix +beaten\n +[\d.]+ ms against [\d.]+ \(.* of its BPU time .*\n +drop .*noise"
    assert re.search(beaten, out, re.MULTILINE), out
    tracker, run = start_run(folder)
    assert tracker.run_metrics(run)["qconfig/n_int16"] == 4.0
    assert "your mix" in (folder / "qflow_out/studies/distracted/int8_int16/report.html").read_text()


def test_a_trial_is_rebuilt_without_the_file_and_the_study_goes_on_wherever_it_lies(started):
    folder, _ = started
    _, run = start_run(folder)
    (folder / "elsewhere").mkdir()
    (folder / "qconfig_j6m.py").rename(folder / "elsewhere/mine.py")
    again = run_qflow("trial", f"from_run={run}", "security.allow=[tree_tasks]", cwd=folder)
    assert again.returncode == 0, again.stdout + again.stderr
    same = ["search.n_trials=8", "search.start=elsewhere/mine.py"]
    done = run_qflow("tune", *DISTRACTED, *same, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("^trial", done.stdout, re.MULTILINE)
    (folder / "elsewhere/mine.py").write_text(MIX.replace("qint16", "qint8", 1))
    done = run_qflow("tune", *DISTRACTED, *same, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "but got others for distracted/int8_int16: search.start: " in done.stderr
