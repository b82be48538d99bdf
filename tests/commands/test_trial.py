"""One trial: a mix of the user's own beside those of a study, and a stored one again."""

import pytest
from support.commands import CUSTOM, run_qflow
from support.documents import document
from support.stored import TINY, store_trial

from qflow.config.quoting import assignment
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # runs commands

SMALL = [*CUSTOM, "task.batch_size=256", "study=own/mixes", "sensitivity.bad_cases=4", "sensitivity.search_samples=32"]


def runs(folder, query):
    """(tags, metrics, params) of the runs of the study that have a tag."""
    tracker = MlflowTracker.open(None, folder / "qflow_out", "own")
    with tracker.calling() as client:
        found = client.search_runs([tracker.experiment_id], query)
    return [(run.data.tags, run.data.metrics, run.data.params, run.info) for run in found]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a study of one trial by hand, and what the command printed."""
    folder = tmp_path_factory.mktemp("own")
    done = run_qflow("trial", *SMALL, "qconfig.template=qint16", "objective.max_drop=0.9", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_a_trial_by_hand_is_a_run_of_the_study_with_everything_that_others_have(own):
    folder, shown = own
    ((tags, metrics, params, info),) = runs(folder, "tags.`qflow.label` = 'by hand'")
    assert info.run_name == "by hand 1"
    assert info.status == "FINISHED"
    assert (tags["qflow.study"], tags["qflow.kind"], tags["qflow.trial"]) == ("own/mixes", "trial", "-1")
    assert params["qconfig.template"] == "qint16"
    assert metrics["qconfig/int16_ratio"] > 0.5
    assert metrics["cost/latency_ms"] > 0
    ((study, *_),) = runs(folder, "tags.`qflow.kind` = 'study'")
    assert study["qflow.study"] == "own/mixes"
    assert "by hand 1" in shown
    assert "has no best trial yet" in shown
    assert f"qflow.promote {assignment('run', info.run_id)}" in shown
    assert "security.allow=" in shown
    assert "viewStateShareKey" not in shown and "searchFilter" in shown  # tune has saved no view


def test_a_stored_trial_comes_out_equal_when_it_is_run_again(own):
    folder, _ = own
    ((*_, info),) = runs(folder, "tags.`qflow.trial` = '-1'")
    done = run_qflow("trial", f"from_run={info.run_id}", "security.allow=[user_task]", "--json", cwd=folder)
    found = document(done)
    assert (done.returncode, found["result"]["equal"], found["result"]["differences"]) == (0, True, []), done.stderr
    figures = found["result"]["figures"]
    assert figures["cost/latency_ms"]["stored"] == figures["cost/latency_ms"]["again"]
    assert "every figure, scale and file is as it was stored" in done.stderr


WRONG = {
    "from_run=runs:/00000000000000000000000000000000": "not found",
    "from_run=nothing": "but got nothing. Name one that exists.",
    "from_run=nothing qconfig.template=qint16": "but got qconfig.template=qint16. Leave it out.",
    "qconfig.modules.nosuch=qint16": "nosuch",
    "qconfig.int16_ratio=interval(0,1)": "takes one value for a key",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_gets_one_line_and_leaves_no_run(own, line):
    folder, _ = own
    before = len(runs(folder, ""))
    given = line.split() if line.startswith("from_run") else [*SMALL, line]
    done = run_qflow("trial", *given, cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert WRONG[line] in done.stderr
    assert len(runs(folder, "")) == before


def test_a_mix_is_compared_with_the_best_of_its_study(own):
    """Here all-int16 is the best; all-int8 differs in every operator."""
    folder, _ = own
    tracker = MlflowTracker.open(None, folder / "qflow_out", "own")
    ((*_, info),) = runs(folder, "tags.`qflow.trial` = '-1'")
    tracker.log_study(tracker.find_study("own/mixes"), tags={"qflow.best": info.run_id, "qflow.goal": "met"})
    done = run_qflow("trial", *SMALL, "objective.max_drop=0.9", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of its BPU time [" in done.stdout
    assert "qint16 in the best, here qint8" in done.stdout
    ((*_, mine),) = runs(folder, "tags.`qflow.trial` = '-2'")
    (line,) = (line for line in done.stdout.splitlines() if "-m qflow.compare" in line)
    assert line.endswith(f"-m qflow.compare {info.run_id} {mine.run_id}")


def test_a_trial_by_hand_joins_a_study_that_was_tuned(tmp_path):
    best, _ = store_trial(tmp_path / "qflow_out", "task=digits")
    given = ["+experiment=int8_int16", "task=digits", *TINY, "qconfig.modules={conv2: qint16}"]
    done = run_qflow("trial", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "conv2: qint8/qint8 in the best, here qint16/qint8" in done.stdout
    tracker = MlflowTracker.open(None, tmp_path / "qflow_out", "digits")
    names = {run: number for run, number, *_ in tracker.trial_runs("digits/int8_int16")}
    assert names.pop(best) == 0
    assert list(names.values()) == [-1]


def test_a_mix_that_misses_the_goal_is_tracked_and_ends_with_1(own):
    folder, _ = own
    over = ["study=own/tight", "objective.max_latency_ms=0.0001", "objective.max_drop=0.9"]
    done = run_qflow("trial", *SMALL, *over, "--json", cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "missed, max_latency_ms by" in done.stderr and "qflow.promote" not in done.stderr
    found = document(done)["result"]
    assert (found["meets"], list(found["missed"])) == (False, ["max_latency_ms"])
    assert len(runs(folder, "tags.`qflow.study` = 'own/tight' and tags.`qflow.kind` = 'trial'")) == 1


def test_a_trial_for_another_device_is_refused_in_the_study(own):
    folder, _ = own
    done = run_qflow("trial", *SMALL, "device=nash-e", "objective.max_drop=0.9", cwd=folder)
    assert done.returncode == 2, done.stdout
    assert "has the model, data, device and goal of its study, but got others for own/mixes: device.cost" in done.stderr
    assert done.stderr.endswith("Use another name: study=own/mixes-2.\n")
