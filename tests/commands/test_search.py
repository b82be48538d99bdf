"""A search with conditions, switches by module and objectives by name on the command line; and what is refused."""

import shutil

import pytest
from support.commands import STORE, UNREPAIRED, open_tracker, run_qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own

SEARCH = [
    *UNREPAIRED, "search=wide", "calibration.batch_size=16", "calibration.steps=4",
    "qconfig.modules.quiet=choice(qint8,qint16)",
    "calibration.method=choice(mse,percentile)", "search.enqueue=[{calibration.method: percentile}]",
    "objective.optimize={cost/traffic_mb: minimize, accuracy/error: minimize}", "search.n_trials=7",
]  # fmt: skip


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    return folder, run_qflow("tune", *SEARCH, cwd=folder)


def test_a_wide_search_tunes_goes_on_and_is_promoted(studied):
    folder, done = studied
    assert done.returncode == 0, done.stdout + done.stderr
    tracker = open_tracker(folder)
    runs = {}
    for run, *_ in tracker.trial_runs("own/int8_int16"):
        runs[tracker.run_tags(run)["qflow.label"] or run] = (tracker.run_params(run), tracker.run_metrics(run))
    assert len(runs) == 7
    for label, dtype, ratio in (("all-int16", "qint16", 1.0), ("all-int8", "qint8", 0.0)):
        params, metrics = runs[label]
        assert (params["qconfig.modules.quiet"], params["calibration.method"]) == (dtype, "mse")
        assert metrics["qconfig/int16_ratio"] == ratio
    assert any(params["calibration.method"] == "percentile" for params, _ in runs.values())
    assert tracker.run_tags(tracker.find_study("own/int8_int16"))["mlflow.note.content"].startswith("# own/int8_int16")
    front = [folder / "qflow_out/studies/own/int8_int16" / name for name in ("best.json", "pareto.json")]
    texts = [path.read_text() for path in front]
    shutil.rmtree(folder / "qflow_out/studies")
    again = run_qflow("tune", *SEARCH, cwd=folder)
    assert "7 trials of an earlier start are kept" in again.stdout, again.stderr
    assert [path.read_text() for path in front] == texts
    promoted = run_qflow("promote", *STORE, cwd=folder)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr


def test_other_objectives_under_the_same_name_are_refused(studied):
    folder, _ = studied
    same = "objective.optimize={accuracy/error: minimize, cost/traffic_mb: minimize}"  # in another order
    done = run_qflow("tune", *[same if a.startswith("objective") else a for a in SEARCH], cwd=folder)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "objective.optimize: cost/traffic_mb, accuracy/error -> accuracy/error, cost/traffic_mb" in done.stderr


BAD = {
    "a metric of no run": (
        ["objective.optimize={cost/latency: minimize}"],
        "got cost/latency. Did you mean cost/latency_ms? There are: accuracy/error",
    ),
    "a budget on a lower bound": (["objective.max_traffic_mb=1"], "needs traffic that can be judged"),
    "a metric that cannot end early": (["search.early_stop=true"], "two finite numbers, but got no bounds"),
    "augmented data that are not there": (
        ["calibration.augment=choice(true,false)"], "augment=true reads task.data.calibration_augmented, but",
    ),
    "every key fixed": (
        ["calibration.method=mse", "calibration.batch_size=8", "calibration.steps=2", "qconfig.int16_ratio=0.3",
         "qconfig.modules.quiet=qint8"],
        "A search needs a key that is open, but got a value for every one. Leave one out",
    ),
    "a switch of nothing": (["qconfig.modules.nosuch=choice(qint8,qint16)"], "but got nosuch"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_gets_one_line(case, tmp_path):
    arguments, message = BAD[case]
    done = run_qflow("tune", *UNREPAIRED, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert message in done.stderr


def test_training_is_searched_where_there_are_steps(tmp_path):
    done = run_qflow(
        "tune", *UNREPAIRED, "search=qat", "qat=default", "task.data._target_=user_task.TrainData", "qat.batch_size=32",
        "qat.loss._target_=user_task.loss", "qat.steps=0", "search.space.qat.steps=choice(0,4)",
        "search.enqueue=[{qat.steps: 4}]",
        "search.n_trials=16", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    tracker = open_tracker(tmp_path)
    found = [tracker.run_params(run) for run, *_ in tracker.trial_runs("own/int8_int16")]
    assert {params.get("qat.steps", "0") for params in found} == {"0", "4"}
    assert len({params["qat.learning_rate"] for params in found if "qat.learning_rate" in params}) > 1
