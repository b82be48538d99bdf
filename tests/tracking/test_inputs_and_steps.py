"""What a run holds beside its values: tables, metrics by step, and the data sets that it used."""

from __future__ import annotations

import pytest

from qflow.tracking.datasets import DataSet
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.tables import find_tables

pytestmark = pytest.mark.slow  # real stores on disk


def start(tracker: MlflowTracker, number: int = 0) -> str:
    parent = tracker.open_study("task/stage", tags={}, params={}, description="")
    return tracker.start_trial(parent, "task/stage", number, "")


def test_tables_are_told_from_other_json(tmp_path):
    (tmp_path / "t.json").write_text('{"columns":["op"],"data":[["conv"]]}')
    (tmp_path / "qconfig.json").write_text('{"columns": 3}')
    (tmp_path / "empty.json").write_text("")
    assert find_tables(tmp_path) == ["t.json"]


def test_a_table_by_step_becomes_curves_that_end_at_the_trials_own_value(tracker, tmp_path):
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / "steps.json").write_text('{"columns":["step","qat/loss"],"data":[[1,0.5],[2,0.25],[3,0.125]]}')
    run_id = start(tracker)
    tracker.commit(
        run_id, "{}", {}, folder=folder, tags={}, metrics={"qat/steps": 3.0, "qat/loss": 0.125, "accuracy/drop": 0.01}
    )
    history = {(m.step, m.value) for m in tracker.client.get_metric_history(run_id, "qat/loss")}
    assert history == {(1, 0.5), (2, 0.25), (3, 0.125)}
    assert tracker.run_metrics(run_id)["qat/loss"] == 0.125
    assert [m.step for m in tracker.client.get_metric_history(run_id, "accuracy/drop")] == [3]


def test_runs_name_their_data_by_digest(tracker):
    content = {"calibration": "8:abc", "evaluation": "16:def"}
    tracker.datasets = [DataSet(f"dogs {k}", k, text, "my.Data", 8) for k, text in content.items()]
    run_id = start(tracker)
    study = tracker.find_study("task/stage")
    for run in (run_id, study):
        inputs = tracker.client.get_run(run).inputs.dataset_inputs
        assert {i.dataset.name: [t.value for t in i.tags] for i in inputs} == {
            "dogs calibration": ["calibration"], "dogs evaluation": ["evaluation"],
        }  # fmt: skip
        assert len({i.dataset.digest for i in inputs}) == 2
    tracker.datasets = [DataSet("dogs calibration", "calibration", "8:xyz", "my.Data", 8)]
    other = tracker.client.get_run(start(tracker, 1)).inputs.dataset_inputs[0].dataset
    assert other.digest not in {i.dataset.digest for i in inputs}
    query = f"dataset.digest = '{other.digest}'"  # as the filter of the UI's column
    assert len(tracker.client.search_runs([tracker.experiment_id], query)) == 1
