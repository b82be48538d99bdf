"""The saved view: its shape, its address, and that failing to write it ends nothing."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from qflow.core.errors import TrackingError
from qflow.tracking.views import TAG, runs_url, save_view, study_url, unpack, view_state

pytestmark = pytest.mark.slow  # real stores on disk


def test_a_view_is_an_experiment_tag_with_a_packed_state(tracker):
    key = save_view(tracker, "task/stage", params=["int16_ratio"])
    assert key is not None
    assert save_view(tracker, "task/stage", params=["int16_ratio"]) == key  # again replaces it
    tags = tracker.client.get_experiment(tracker.experiment_id).tags
    entry = json.loads(tags[TAG + key])
    assert entry["name"] == "task/stage: accuracy/drop against cost/latency_ms"
    assert entry["state"].startswith("deflate;")
    state = unpack(entry["state"])
    assert state == view_state("task/stage", [], ["int16_ratio"], None, "cost/latency_ms", "accuracy/drop")
    assert [chart["type"] for chart in state["compareRunCharts"]] == ["SCATTER", "PARALLEL"]
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {
        section["uuid"] for section in state["compareRunSections"]
    }
    runs = tracker.client.search_runs([tracker.experiment_id], state["searchFilter"])
    assert list(runs) == []  # the filter is one that MLflow understands


@pytest.mark.parametrize("largest", [0.1234567, 1.0000004e-05, 1.0 / 3.0])
def test_the_largest_drop_that_the_view_shows_is_among_the_listed_runs(tracker, largest):
    with tracker.calling() as client:
        run = client.create_run(tracker.experiment_id, tags={"qflow.study": "task/bound", "qflow.kind": "trial"})
        client.log_metric(run.info.run_id, "accuracy/drop", largest)
    state = view_state("task/bound", [], [], largest, "cost/latency_ms", "accuracy/drop")
    found = tracker.client.search_runs([tracker.experiment_id], state["searchFilter"])
    assert [r.info.run_id for r in found] == [run.info.run_id]


def test_an_address_has_no_password():
    assert runs_url("https://me:pass@host:8443/ml", "1") == "https://host:8443/ml/#/experiments/1/runs"
    assert runs_url("sqlite:///store.db", "1").startswith("http://127.0.0.1:5000/")


def test_addresses_open_the_mode_for_machine_learning():
    saved = study_url("http://host:5000/", "1", "task/stage", "abc")
    plain = study_url("http://host:5000", "1", "task/stage", charts=False)
    assert saved == (
        "http://host:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=abc"
        "&compareRunsMode=CHART"
    )
    query = parse_qs(urlsplit(urlsplit(plain).fragment).query)
    assert query["orderByKey"] == ["metrics.`goal/rank`"]
    assert "tags.`qflow.study` = 'task/stage'" in query["searchFilter"][0]


def test_a_view_that_cannot_be_saved_ends_nothing(tracker, monkeypatch):
    def refuse(*_args):
        raise TrackingError("No.")

    monkeypatch.setattr(tracker.client, "set_experiment_tag", refuse)
    assert save_view(tracker, "task/stage") is None


def test_the_best_trial_comes_first_and_the_columns_say_what_decides():
    state = view_state("s", ["qat/loss"], ["calibration.method"], 0.25, "cost/latency_ms", "accuracy/drop")
    assert (state["orderByKey"], state["orderByAsc"]) == ("metrics.`goal/rank`", True)
    names = [column.partition(".")[2].strip("`") for column in state["selectedColumns"]]
    assert names == [
        "goal/rank", "goal/meets", "accuracy/drop", "cost/latency_ms", "qconfig/int16_ratio", "qat/loss",
        "calibration.method",
    ]  # fmt: skip
    assert state["searchFilter"].endswith(" and metrics.`accuracy/drop` <= 0.25")
