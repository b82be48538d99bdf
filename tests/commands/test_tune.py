"""The whole way of a user with a task of their own: tune, go on, promote; and what is refused on the way."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support.commands import OWN, OWN_CODE, STORE, TESTS, UNREPAIRED, measured, open_tracker, run_qflow
from support.documents import document

pytestmark = pytest.mark.slow  # starts commands as processes of their own


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    return folder, run_qflow("tune", *OWN, "search.n_trials=7", cwd=folder)


def test_the_mix_meets_the_goal_that_int8_misses_for_less_than_int16(studied):
    folder, done = studied
    assert done.returncode == 0, done.stdout + done.stderr
    tracker = open_tracker(folder)
    runs = {tags["qflow.label"]: metrics for metrics, tags in measured(tracker)}
    best = tracker.run_metrics(tracker.run_tags(tracker.find_study("own/int8_int16"))["qflow.best"])
    assert runs["all-int8"]["accuracy/drop"] > 0.01 >= runs["all-int16"]["accuracy/drop"]
    assert best["accuracy/drop"] <= 0.01
    int8, mix, int16 = (m["cost/latency_ms"] for m in (runs["all-int8"], best, runs["all-int16"]))
    assert int8 <= mix < int16  # what only additions read costs nothing to raise
    for name in ("float", "all-int16", "all-int8", "best mix"):
        assert re.search(rf"^{name} +0\.\d", done.stdout, re.MULTILINE), name
    assert "mlflow ui" in done.stdout
    assert "python -m qflow.promote study=own/int8_int16" in done.stdout
    assert "\r" not in done.stdout  # plain lines where there is no terminal


def test_a_run_holds_what_it_is_rebuilt_from(studied):
    from qflow.core.record import from_dict

    folder, _ = studied
    tracker = open_tracker(folder)
    best = tracker.run_tags(tracker.find_study("own/int8_int16"))["qflow.best"]
    got = {}
    for name in (
        "config.yaml", "qconfig/qconfig.json", "qconfig/scales.json", "qconfig.txt", "sensitivity.json", "cost.json",
        "model_check.json", "model_check_result.txt", "manifest.json",
    ):  # fmt: skip
        got[name] = tracker.download(best, name, folder / "got").read_text()
        assert got[name], name
    tags = tracker.run_tags(best)
    assert tags["mlflow.parentRunId"] == tracker.find_study("own/int8_int16")
    for table in ("sensitivity.json", "cost.json", "model_check.json"):
        assert f'"{table}"' in tags["mlflow.loggedArtifacts"]
    metrics = tracker.run_metrics(best)
    assert {"accuracy/error", "accuracy/drop", "cost/latency_ms", "qconfig/int16_ratio"} <= set(metrics)
    params = tracker.run_params(best)
    assert params["calibration.method"] in ("minmax", "mse")
    assert bool(params["qconfig.assignment"]) != ("qconfig.int16_ratio" in params)  # one rule, no zero beside it

    from qflow.core.qconfig import QConfig

    logged = from_dict(QConfig, json.loads(got["qconfig/qconfig.json"]))
    assert logged.digest == tags["qflow.qconfig"]


def test_the_same_command_goes_on_and_repeats_nothing(studied):
    folder, _ = studied
    again = run_qflow("tune", *OWN, "search.n_trials=8", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert "7 trials of an earlier start are kept" in again.stdout
    assert "with the advice on the study's run: nothing that they depend on has changed" in again.stdout
    assert len(re.findall(r"^trial \d+", again.stdout, re.MULTILINE)) == 1
    done = run_qflow("tune", *OWN, "search.n_trials=8", cwd=folder)  # and of a finished study nothing is left to do
    (line,) = re.findall(r"^cache +read instead of computed: (.*)", done.stdout, re.MULTILINE)
    assert all(read == every for read, every in re.findall(r"(\d+) of (\d+)", line)) and "evaluation" not in line, line
    result = [text.partition("decisions ")[0].partition("\nfloat ")[2] for text in (again.stdout, done.stdout)]
    assert result[0] == result[1] != ""


def test_another_configuration_under_the_same_name_is_refused(studied):
    folder, _ = studied
    other = run_qflow("tune", *OWN, "calibration.steps=5", cwd=folder)
    assert other.returncode == 2
    assert (
        "keeps the settings that it began with, but got others for own/int8_int16: calibration.steps: 4 -> 5"
        in other.stderr
    )
    assert "study=own/int8_int16-2" in other.stderr


def test_promote_rebuilds_registers_and_moves_the_alias(studied):
    folder, _ = studied
    done = run_qflow("promote", *STORE, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "version 1, alias champion moved" in done.stdout
    assert "is this run already" in run_qflow("promote", *STORE, cwd=folder).stdout


def test_promote_refuses_with_every_reason(studied):
    """The same run on other weights: metric, scales and the fingerprint all differ."""
    folder, _ = studied
    changed = folder / "changed"
    changed.mkdir(exist_ok=True)
    source = (
        (TESTS / "support" / "user_task.py").read_text().replace("digits.build_model()", "digits.build_model(epochs=1)")
    )
    (changed / "user_task.py").write_text(source)
    done = run_qflow("promote", *STORE, f"root={folder}/qflow_out", cwd=folder, PYTHONPATH=f"{changed}:{OWN_CODE}")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "weights are not those of the run" in done.stdout
    assert "accuracy/error was logged as" in done.stdout
    assert "scales differ" in done.stdout


def test_promote_names_what_is_missing(studied, tmp_path):
    folder, _ = studied
    unknown = run_qflow("promote", "study=nope", "tracking.experiment=own", cwd=folder)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert "unknown in sqlite" in unknown.stderr


BAD = {
    "empty calibration": (["task.data._target_=user_task.EmptyData"], "holds samples, but got none"),
    "NaN in data": (["task.data._target_=user_task.NanData"], "got NaN or inf in task.data.calibration"),
    "NaN in the float model": (["task.model._target_=user_task.nan_model"], "Outputs of a model are finite"),
    "another float metric": (["task.float_metric=0.5"], "reaches the metric its task states"),
    "a batch the model cannot take": (
        ["task.data._target_=qflow.tasks.perception.data.build_data"],
        "must take the batches",
    ),
    "int16 x int16": (["+qconfig.modules.quiet=qint16/qint16"], "no int16 x int16"),
    "unreachable server": (["tracking.uri=http://127.0.0.1:9"], "127.0.0.1:9"),
    "no such model": (["task.model._target_=user_task.nothing"], "task.model._target_ must import and run"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_users_mistake_gets_one_line_and_leaves_nothing_finished(case, tmp_path):
    arguments, message = BAD[case]
    done = run_qflow("tune", *OWN, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    if (tmp_path / "qflow_out" / "mlflow.db").exists():
        assert not measured(open_tracker(tmp_path))


def test_debug_shows_the_traceback(tmp_path):
    done = run_qflow("tune", *OWN, "qconfig.int16_ratio=7", cwd=tmp_path, QFLOW_DEBUG="1")
    assert "Traceback" in done.stderr
    assert "lies between 0 and 1" in done.stderr


def test_interrupted_or_killed_the_study_goes_on(tmp_path):
    """Ctrl-C after some trials, in an interpreter of its own, then SIGKILL, then to the end: nothing is lost, nothing
    runs twice, and what was interrupted has a report.
    """
    study = [*UNREPAIRED, "search.n_trials=7"]
    seen = _interrupted(study, tmp_path)
    killed = run_qflow("tune", *study, cwd=tmp_path, killed_after="trial 4")
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    done = run_qflow("tune", *study, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = open_tracker(tmp_path).trial_runs("own/int8_int16")
    finished = [number for _, number, status, _ in runs if status == "FINISHED"]
    assert len(finished) == len(set(finished)) == 7
    assert not any(status == "RUNNING" for _, _, status, _ in runs)
    seen += re.findall(r"^trial (\d+)", killed.stdout + done.stdout, re.MULTILINE)
    assert set(map(int, seen)) <= {number for _, number, *_ in runs}


def _interrupted(study, folder):
    """The numbers of the trials that a new interpreter prints, to which Ctrl-C is sent after trial 2."""
    env = {**os.environ, "PYTHONPATH": f"{OWN_CODE}:{os.environ.get('PYTHONPATH', '')}", "QFLOW_HOME": ""}
    process = subprocess.Popen(
        [sys.executable, "-m", "qflow.tune", *study, "--json"], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    shown = ""
    for line in process.stderr:  # with --json, what is printed for people
        shown += line
        if line.startswith("trial 2") or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in err
    assert "Traceback" not in err
    found = document(subprocess.CompletedProcess(process.args, 130, out, err))
    assert found["error"]["type"] == "Interrupted"
    assert found["result"]["trials"] > 2 and found["result"]["study"] == "own/int8_int16"
    page = folder / "qflow_out/studies/own/int8_int16/report.html"
    assert f"report      {page}\n" in shown + err
    assert "(the study has not ended)" in page.read_text() and "<b>all-int16</b>" in page.read_text()
    return re.findall(r"^trial (\d+)", shown + err, re.MULTILINE)


MORE = {
    "a metric that raises": (
        ["task.metric._target_=user_task.BadMetric"],
        "must score (outputs, batch), but got KeyError",
    ),
    "a root that is a file": (["root=taken"], "taken"),
    "a batch size of 0": (["task.batch_size=0"], "task.batch_size lies between 1 and 1000000"),
    "a name of nothing": (["+qconfig.modules.nosuch=qint16"], "but got nosuch"),
    "an open bracket": (["calibration.method=choice(mse"], "closed brackets"),
}


@pytest.mark.parametrize("case", MORE)
def test_more_mistakes_get_one_line(case, tmp_path):
    arguments, message = MORE[case]
    (tmp_path / "taken").write_text("")
    done = run_qflow("tune", *OWN, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_options_may_stand_anywhere_and_a_users_conf_folder_is_found(tmp_path):
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text("name: mine\nmodel: {_target_: user_task.model}\n")
    done = run_qflow(
        "tune", "+experiment=int8_int16", "--config-dir", "conf", "task=mine", "--cfg", "job", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "name: mine" in done.stdout


def test_a_study_without_a_trial_takes_other_settings(tmp_path):
    refused = run_qflow("tune", *UNREPAIRED, "+qconfig.modules.nosuch=qint16", cwd=tmp_path)
    assert refused.returncode == 2
    assert run_qflow("tune", *UNREPAIRED, "calibration.steps=3", "search.n_trials=2", cwd=tmp_path).returncode in (0, 1)


def test_runs_that_are_gone_are_noticed(studied, tmp_path):
    import shutil

    for file in (studied[0] / "qflow_out").glob("optuna.db*"):  # with the log of what SQLite has not put in yet
        shutil.copy(file, tmp_path / file.name)
    lost = run_qflow("tune", *OWN, "search.n_trials=8", f"root={tmp_path}", cwd=tmp_path)
    assert lost.returncode == 2
    assert "finished trials and no run in" in lost.stderr


def test_an_unknown_run_is_named(studied):
    done = run_qflow("promote", "run=deadbeef", cwd=studied[0])
    assert done.returncode == 2
    assert "What is asked of a store must exist there, but got 'Run with id=deadbeef not found'" in done.stderr
