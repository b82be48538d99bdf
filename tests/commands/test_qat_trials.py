"""Trials with QAT through the commands: trained, tracked with their weights, rebuilt by promote; refusals."""

import json

import pytest
from support.commands import STORE, UNREPAIRED, measured, open_tracker, run_qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own

QAT = [
    *UNREPAIRED, "task.data._target_=user_task.TrainData", "qat=default", "qat.steps=6", "qat.batch_size=32",
    "qat.loss._target_=user_task.loss", "+qat.rates={loud: 0.0001}", "qat.learning_rate=0.001", "search.n_trials=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    return folder, run_qflow("tune", *QAT, "qat.float_steps=20", "objective.max_drop=0.5", cwd=folder)


def test_trials_are_trained_and_keep_their_weights(studied, tmp_path):
    folder, done = studied
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each trial is trained after its calibration: 6 steps" in done.stdout
    assert "qat.float_steps=<n>" not in done.stdout
    assert done.stdout.count("QAT 4 steps") == 2
    tracker = open_tracker(folder)
    for run, *_ in tracker.trial_runs("own/int8_int16"):
        assert tracker.run_metrics(run)["qat/steps"] == 4.0  # a fifth of the float steps
        report = json.loads(tracker.download(run, "training.json", tmp_path).read_text())
        assert len(report["losses"]) == 4
        for name, series in {"qat/loss": report["losses"], "qat/learning_rate": report["learning_rates"]}.items():
            history = {m.step: m.value for m in tracker.client.get_metric_history(run, name)}
            assert history == {step: pytest.approx(value, rel=1e-5) for step, value in enumerate(series, 1)}
        assert "QAT takes at most 20 % of 20 float steps: 6 steps cut to 4" in report["findings"]
        assert tracker.download(run, "qconfig/weights.safetensors", tmp_path).stat().st_size > 1000
    assert len(measured(tracker)) == 2


def test_promote_trains_again_and_finds_the_same_numbers(studied):
    folder, _ = studied
    done = run_qflow("promote", *STORE, "tracking.registered_model=own", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "alias champion moved" in done.stdout


def test_the_debug_order_names_the_stage(tmp_path):
    arguments = [a for a in QAT if not a.startswith(("+experiment", "calibration.method", "search."))]
    done = run_qflow(
        "analyze", "qat_debug", *arguments, "qconfig.template=qint16", "objective.max_drop=0.5", cwd=tmp_path
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    record = json.loads((tmp_path / "qflow_out" / "analyze" / "own" / "qat_debug.json").read_text())
    stages = {stage["name"]: stage for stage in record["stages"]}
    assert stages["rate 0"]["metric"] == record["calibrated_metric"]
    assert "verdict" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["qat.loss._target_=null"], "QAT needs a loss, but got none"),
        (["qat.loss._target_=user_task.nothing"], "qat.loss._target_ must import, but got"),
        (
            ["qat.loss._target_=null", "qat.teacher.weight=1", "qat.teacher.features=[nowhere]"],
            "qat.teacher.features names modules, but got 'nowhere'",
        ),
        (["qat.teacher.temperature=2"], "Set qat.teacher.weight=1"),
        (["qat.mode=often"], "qat.mode is one of fuse_bn, with_bn, with_bn_reverse_fold, but got 'often'"),
        (["qat.optimizer._target_=torch.optim.Nothing"], "qat.optimizer"),
        (["task.data._target_=user_task.Data"], "QAT needs task.data.train"),
        (["+qat.rates={nowhere: 0.1}"], "qat.rates names modules, but got 'nowhere'"),
        (["qat.loss._target_=user_task.wild_loss"], "is finite, but got"),
        (["task.model._target_=user_task.frozen"], "QAT trains parameters, but got a model in which all are frozen"),
        (["qat.freeze=[inner,loud,quiet]"], "got qat.freeze=[inner,loud,quiet], which covers them all"),
        (["qat.batch_size=1024"], "at least one batch of 1024, but got 512 samples"),
        (["qat.scheduler._target_=torch.optim.lr_scheduler.LinearLR"], "no warm-up, but got a rate that rises"),
        (["qat.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"], "stepped without arguments"),
    ],
)
def test_what_cannot_train_is_refused_in_one_line(arguments, says, tmp_path):
    done = run_qflow("tune", *QAT, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
