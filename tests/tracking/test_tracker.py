"""The tracker on a real SQLite store: what a run holds, what is found again, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from qflow.core.errors import ConfigError, TrackingError
from qflow.search.domain import Choice
from qflow.search.study import Study
from qflow.tracking import limits
from qflow.tracking.artifacts import Store
from qflow.tracking.limits import rounded
from qflow.tracking.mlflow_tracker import BATCH, MlflowTracker

pytestmark = pytest.mark.slow  # real stores on disk

TABLE = pd.DataFrame({"op": ["conv", "fc"], "sensitivity": [0.5, 0.25]})


def write_table(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    TABLE.to_json(path, orient="split", index=False)


def start(tracker: MlflowTracker, number: int = 0, study: str = "task/stage", label: str = "") -> str:
    parent = tracker.open_study(study, tags={}, params={}, description="")
    return tracker.start_trial(parent, study, number, label)


def commit(tracker: MlflowTracker, run_id: str, **changes) -> None:
    values = {"outcome_json": "{}", "params": {}, "metrics": {}, "tags": {}, "folder": None, **changes}
    tracker.commit(run_id, **values)


def test_a_committed_trial_holds_everything(tracker, tmp_path):
    folder = tmp_path / "trial"
    write_table(folder / "sensitivity.json")
    (folder / "qconfig.json").write_text('{"conv": "qint8"}')
    (folder / "deep").mkdir()
    (folder / "deep" / "note.txt").write_text("note")
    run_id = start(tracker, 3, label="all-int8")
    assert tracker.result(run_id) is None
    commit(
        tracker, run_id, outcome_json='{"a":1}', folder=folder, tags={"qflow.pareto": "true"},
        params={"method": "kl", "ratio": 0.5, "fast": True, "limit": None},
        metrics={"accuracy/drop": 0.123456789, "cost/latency_ms": 1234567.8},
    )  # fmt: skip
    tracker.end(run_id, "FINISHED")
    assert tracker.result(run_id) == '{"a":1}'
    assert tracker.run_params(run_id) == {"method": "kl", "ratio": "0.5", "fast": "True", "limit": "None"}
    assert tracker.run_metrics(run_id) == {"accuracy/drop": 0.123457, "cost/latency_ms": 1234570.0}
    tags = tracker.run_tags(run_id)
    assert tags["qflow.label"] == "all-int8"
    assert tags["mlflow.source.name"] == "qflow"
    assert tags["mlflow.loggedArtifacts"] == '[{"path": "sensitivity.json", "type": "table"}]'
    assert tags["mlflow.parentRunId"] == tracker.open_study("task/stage", tags={}, params={}, description="")
    assert tracker.download(run_id, "deep/note.txt", tmp_path / "down").read_text() == "note"
    assert pd.read_json(tracker.download(run_id, "sensitivity.json", tmp_path / "down"), orient="split").equals(TABLE)
    assert tracker.trial_runs("task/stage") == [(run_id, 3, "FINISHED", '{"a":1}')]


def test_the_marker_comes_last_even_when_mlflow_splits_the_batch(tracker, monkeypatch):
    sent = []
    real = tracker.client.log_batch
    monkeypatch.setattr(tracker.client, "log_batch", lambda *args, **kw: (sent.append(sorted(kw)), real(*args, **kw)))
    small, large = start(tracker, 0), start(tracker, 1)
    commit(tracker, small, params={"p": 1}, metrics={"m": 1.0})
    assert len([keys for keys in sent if "tags" in keys][-1:]) == 1
    sent.clear()
    commit(
        tracker,
        large,
        params={f"p{i}": i for i in range(BATCH + 30)},
        metrics={f"m{i}": float(i) for i in range(1200)},
    )
    assert ["tags" in keys for keys in sent] == [False, True]
    assert len(tracker.run_params(large)) == BATCH + 30
    assert len(tracker.run_metrics(large)) == 1200
    assert tracker.result(large) == "{}"


def test_a_study_is_found_again_and_set_running(open_tracker):
    tracker = open_tracker()
    options = {"tags": {"qflow.experiment": "int8"}, "description": "# Study"}
    run_id = tracker.open_study("task/stage", params={"n_trials": 8, "seed": 0}, **options)
    tracker.end(run_id, "FINISHED")
    other = open_tracker()
    assert other.open_study("task/stage", params={"n_trials": 12, "seed": 0, "new": 1}, **options) == run_id
    assert other.client.get_run(run_id).info.status == "RUNNING"
    assert other.run_params(run_id) == {"n_trials": "8", "seed": "0", "new": "1"}
    tags = other.run_tags(run_id)
    assert tags["qflow.changed_params"] == '{"n_trials": 12}'
    assert tags["mlflow.note.content"] == "# Study"
    assert other.open_study("task/stage2", params={}, **options) != run_id


def test_study_tables_add_up_over_calls(tracker, tmp_path):
    run_id = tracker.open_study("s", tags={}, params={}, description="")
    for name in ("pareto", "sensitivity"):
        write_table(tmp_path / name / f"{name}.json")
        tracker.log_study(run_id, folder=tmp_path / name, metrics={"study/trials": 3}, params={"p": name})
    tracker.log_study(run_id, tags={"qflow.best": "7"})
    tags = tracker.run_tags(run_id)
    assert [name in tags["mlflow.loggedArtifacts"] for name in ("pareto.json", "sensitivity.json")] == [True] * 2
    assert (tags["qflow.best"], tracker.run_params(run_id)["p"]) == ("7", "pareto")


def test_trials_are_found_by_tag(tracker):
    runs = [start(tracker, number) for number in range(3)]
    start(tracker, 0, study="other")
    tracker.end(runs[0], "KILLED", "because")
    assert tracker.find_trial("task/stage", 1) == runs[1]
    assert tracker.find_trial("task/stage", 9) is None
    assert sorted(tracker.running_trials("task/stage")) == sorted(runs[1:])
    assert tracker.run_tags(runs[0])["qflow.end_reason"] == "because"


def test_seconds_count_nested_calls_once(tracker):
    tracker.seconds = 0.0
    began = time.monotonic()
    commit(tracker, start(tracker), params={"a": 1})
    assert 0 < tracker.seconds <= time.monotonic() - began


@pytest.mark.parametrize(
    ("value", "short"), [(0.0, 0.0), (1 / 3, 0.333333), (-123456789.0, -123457000.0), (math.inf, math.inf)]
)
def test_six_significant_digits(value, short):
    assert rounded(value) == short


def test_an_unreachable_server_is_refused_in_seconds(tmp_path):
    began = time.monotonic()
    with pytest.raises(TrackingError, match=r"answer within 4 s, but got '.*' from http://127.0.0.1:9\. Start") as got:
        MlflowTracker.open("http://127.0.0.1:9", tmp_path, "experiment")
    assert time.monotonic() - began < 5
    assert "\n" not in str(got.value)


def test_a_server_that_never_answers_is_refused_in_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr("qflow.tracking.connect.ANSWER_SECONDS", 0.1)
    monkeypatch.setattr("qflow.tracking.connect._health", lambda _uri: time.sleep(3))
    with pytest.raises(TrackingError, match="no answer"):
        MlflowTracker.open("http://tracking.invalid", tmp_path, "experiment")


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "file:///tmp/mlruns", "ftp://host/x", "databricks"])
def test_the_file_store_is_refused_with_the_reason(tmp_path, uri):
    with pytest.raises(TrackingError, match=r"retired the file store.*sqlite:///FILE"):
        MlflowTracker.open(uri, tmp_path, "experiment")


def test_a_store_of_another_schema_is_refused(tracker, open_tracker):
    tracker.client.set_experiment_tag(tracker.experiment_id, "qflow.schema", "2")
    with pytest.raises(TrackingError, match="schema 1, but got schema 2 for experiment 'experiment'") as got:
        open_tracker()
    assert "\n" not in str(got.value)


def test_a_deleted_experiment_is_refused(tracker, open_tracker):
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match="deleted 'experiment'"):
        open_tracker()


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(TrackingError, match="not a database") as got:
        MlflowTracker.open(None, tmp_path, "experiment")
    assert "\n" not in str(got.value)


def test_errors_of_the_store_are_one_line(tracker, tmp_path):
    with pytest.raises(TrackingError, match="not found") as got:
        tracker.run_tags("0" * 32)
    assert "\n" not in str(got.value)
    with pytest.raises(TrackingError):
        tracker.download(start(tracker), "absent.json", tmp_path)
    with pytest.raises(TrackingError, match="no quotes"):
        tracker.find_trial("it's", 0)


def test_a_relative_uri_becomes_absolute_and_names_the_ui_command(store, monkeypatch):
    monkeypatch.chdir(store)
    tracker = MlflowTracker.open("sqlite:///mlflow.db", Path("."), "experiment")
    assert tracker.uri == f"sqlite:///{store}/mlflow.db"
    assert tracker.ui_command() == f"mlflow ui --workers 1 --backend-store-uri {tracker.uri}"
    assert tracker.client.get_experiment(tracker.experiment_id).artifact_location == str(store / "artifacts")


def test_opening_a_new_store_is_silent_and_the_package_is_light(tmp_path):
    code = (
        "import sys, pathlib; import qflow.tracking.mlflow_tracker as t, qflow.tracking.registry, "
        "qflow.tracking.views, qflow.search.loop; assert 'mlflow' not in sys.modules; "
        "assert 'torch' not in sys.modules; "
        f"t.MlflowTracker.open(None, pathlib.Path({str(tmp_path)!r}), 'e')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_study_is_found_in_another_experiment(tracker, store):
    tracker.open_study("s", tags={}, params={}, description="")
    other = MlflowTracker.open(None, store, "elsewhere")
    assert other.find_study("s") is None
    assert [list(Store(tracker.client, tracker.uri).studies(name)) for name in ("s", "t")] == [["experiment"], []]


def test_of_two_runs_that_were_created_at_once_the_first_is_the_study(tracker):
    first = tracker.open_study("s", tags={}, params={}, description="")
    tags = {"qflow.study": "s", "qflow.kind": "study"}
    tracker.client.create_run(tracker.experiment_id, tags=tags)
    assert tracker.find_study("s") == first


@pytest.mark.parametrize("name", ["a%20b", "{x}?y#z", "%%2F & é@\\ [x]:$HOME;~\n日本", "out.v1"])
def test_a_study_lives_in_a_folder_of_any_name(tmp_path, name):
    root = tmp_path / "in" / name
    root.mkdir(parents=True)
    write_table(tmp_path / "files" / "deep" / "table.json")
    tracker = MlflowTracker.open(None, root, "experiment")
    run_id = start(tracker)
    commit(tracker, run_id, folder=tmp_path / "files")
    found = tracker.download(run_id, "deep/table.json", tmp_path / "down")
    assert pd.read_json(found, orient="split").equals(TABLE)
    assert MlflowTracker.open(tracker.uri, root, "experiment").find_study("task/stage")
    study = Study.open(root, "task/stage", space={"x": Choice((1, 2))}, directions=("minimize",))
    study.ask()
    assert len(Study.open(root, "task/stage", space=study.space, directions=study.directions).trials()) == 1
    assert list((tmp_path / "in").iterdir()) == [root]
    assert {p.name for p in tmp_path.iterdir()} == {"in", "files", "down"}


def test_texts_beyond_mlflows_limits_are_kept_whole_or_cut_in_sight(tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")  # MLflow then refuses what is too long
    run_id = start(tracker)
    for text in ("x" * 20_000 + "end", "y" * limits.TAG, "short"):  # a shorter text after a longer one
        commit(tracker, run_id, outcome_json=text, params={}, tags={"mlflow.note.content": text})
        assert tracker.result(run_id) == text
        assert [marker for *_, marker in tracker.trial_runs("task/stage")] == [text]
    long = {"qconfig.note": "z" * 9000}
    study = tracker.open_study(
        "task/stage", tags={"qflow.fingerprint": "f" * 9000}, params=long, description="d" * 9000
    )
    assert tracker.run_params(study)["qconfig.note"] == "z" * 5999 + "…"
    assert tracker.run_tags(study)["qflow.fingerprint"] == "f" * 9000
    assert tracker.run_tags(study)["mlflow.note.content"].endswith("d…")
    tracker.open_study("task/stage", tags={}, params=long, description="")  # the cut value has not changed
    assert "qflow.changed_params" not in tracker.run_tags(study)


def test_every_metric_name_that_passes_is_stored(tracker):
    run_id = start(tracker)
    for name in ("map@0.5:0.95 (val) %", "m" * 300, "a//b", "../a", "/a", "a/", "精度?", "a\n", "drop"):
        with pytest.raises(ConfigError, match=r"Give the metric another: name = '(.+)'") as caught:
            limits.check_metric_name(name)
        assert "\n" not in str(caught.value)
    for name in ("map_0.5:0.95 _val_ _", "精度/top1", "m" * 200, "a b.c-d"):
        limits.check_metric_name(name)
        tracker.log_study(run_id, metrics={f"accuracy/{name}": 1.0})
        assert tracker.run_metrics(run_id)[f"accuracy/{name}"] == 1.0


def test_a_searched_module_of_any_name_is_a_param(tracker):
    run_id = start(tracker)
    keys = ["qconfig.modules.[add](1)", f"qconfig.modules.{'deep.' * 80}conv", f"qconfig.modules.{'deep.' * 80}fc"]
    names = [limits.param_name(key) for key in keys]
    tracker.log_study(run_id, params=dict.fromkeys(names, "qint16"))
    assert names[0] == "qconfig.modules._add__1_"
    assert set(tracker.run_params(run_id)) == set(names)
    assert len(set(names)) == 3


@pytest.mark.parametrize("name", ["", "x" * 501])
def test_an_experiments_name_is_checked_before_the_store_opens(tmp_path, name):
    with pytest.raises(ConfigError, match="tracking.experiment has 1 to 500 characters"):
        MlflowTracker.open(None, tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_registered_model_gets_a_name_that_the_registry_takes():
    assert limits.model_name("exp: a=b/c") == "exp- a=b-c"
    for name in ("", "..", "/"):
        with pytest.raises(ConfigError, match=r"tracking\.registered_model="):
            limits.model_name(name)
    for name in ("a\x00b", "a\x1b[31m", "a\nb", "a" * 251):
        with pytest.raises(ConfigError, match="all of which a line shows"):
            limits.model_name(name)
