"""A network that needs an int16 weight and is content with int8 inputs: the tree finds it, before any fp16."""

import re

import pytest
from support.commands import run_qflow
from support.dark_channel import Agreement, Data, model

from qflow.config.device_file import load_cost, load_rules
from qflow.core.dtype import QDtype
from qflow.core.settings import CalibrationSettings, QConfigSettings, TrialSettings
from qflow.tasks.task import make_task
from qflow.trial.evaluator import Evaluator

GOAL = 0.01
TASK = [
    "task=custom", "task.name=dark", "task.model._target_=support.dark_channel.model",
    "task.data._target_=support.dark_channel.Data", "task.metric._target_=support.dark_channel.Agreement",
    "calibration.steps=4", f"objective.max_drop={GOAL}", "search.n_trials=14", "repair=none", "executor.threads=1",
]  # fmt: skip
STORE = ["study=dark/full", "tracking.registered_model=dark", "security.allow=[support]"]


def test_the_weight_alone_is_why_all_int16_misses():
    task = make_task(name="dark", model=model(), data=Data, metric=Agreement())
    calibration = CalibrationSettings(steps=4)
    evaluator = Evaluator(task, load_rules("nash-m"), load_cost("nash-m"), default_calibration=calibration)
    evaluator.measure_float()
    evaluator.rank()
    precisions = evaluator.precisions

    def drop(**qconfig):
        settings = QConfigSettings(**qconfig)
        return evaluator.run_trial(TrialSettings(calibration=calibration, qconfig=settings)).drop

    assert drop() > 2 * GOAL and drop(int16_ratio=1.0) > 2 * GOAL
    for rest in (QDtype.qint8, QDtype.qint16):
        assert precisions.weight_order(QConfigSettings(), rest)[0] == "stem"
    mix = precisions.weight_mix(QConfigSettings(), QDtype.qint16, ["stem"])
    assert drop(assignment=mix, sensitive_type="both") <= GOAL
    assert min(drop(int16_ratio=r, sensitive_type="both") for r in (0.2, 0.4, 0.6)) <= GOAL


@pytest.mark.slow
@pytest.mark.parametrize("search", ["assign", "ratio", pytest.param("error_share", marks=pytest.mark.proof)])
def test_the_tree_reaches_int16_weights_and_promote_rebuilds_them(search, tmp_path):
    done = run_qflow("tune", "+experiment=full", f"search={search}", *TASK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^decision     all-int16: misses the goal .* int16 weights are next$", done.stdout, re.MULTILINE)
    assert "decision     int16 weights: int16 for 1 of " in done.stdout
    assert "fp16 " not in re.sub(r"int16/fp16|no operator needs fp16", "", done.stdout)
    assert re.search(r"^int16 weight stem$", done.stdout, re.MULTILINE)
    met = re.search(
        r"^decision     int8/int16: trial \d+ meets the goal with (\d) int16 op.* and (\d) ", done.stdout, re.M
    )
    assert (int(met[1]) <= 3, int(met[2])) == (True, 1)
    promoted = run_qflow("promote", *STORE, cwd=tmp_path)
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    assert "version 1, alias champion moved" in promoted.stdout


@pytest.mark.slow
def test_where_int16_times_int16_exists_the_input_may_stay_int16(tmp_path):
    done = run_qflow("tune", "+experiment=int16", "device=nash-m-oe32", *TASK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    line = re.search(r"^trial 1 int16, int16 weights=1 .*int16 (\d\.\d\d)", done.stdout, re.MULTILINE)
    assert float(line[1]) == 1.0


TONED = [
    *(arg for arg in TASK if not arg.startswith(("task.model", "task.data", "task.metric", "objective", "search"))),
    "task.model._target_=support.dark_channel.toned", "task.metric._target_=support.dark_channel.BothRight",
    "objective.max_drop=0.03", "search.n_trials=16",
]  # fmt: skip
WIDE = ["task.data._target_=support.dark_channel.TonedData"]
MILD = ["task.data._target_=support.dark_channel.MildData", "+task.model.most=15.0"]


@pytest.mark.slow
@pytest.mark.parametrize("workflow", [pytest.param("int16_fp16", marks=pytest.mark.proof), "int8_int16_fp16"])
def test_the_branches_with_fp16_try_int16_weights_first(workflow, tmp_path):
    done = run_qflow("tune", f"+experiment={workflow}", *TASK, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^decision     all-int16: misses the goal .* int16 weights are next$", done.stdout, re.MULTILINE)
    assert re.search(r"^decision     int16 weights: .*: stem; no operator needs fp16$", done.stdout, re.MULTILINE)
    assert "float16_count" not in done.stdout
    assert ("decision     int8/int16: trial" in done.stdout) == (workflow == "int8_int16_fp16")


@pytest.mark.slow
def test_fp16_goes_on_top_of_what_int16_weights_have_reached(tmp_path):
    done = run_qflow("tune", "+experiment=int8_int16_fp16", *TONED, *MILD, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "decision     int16 weights: the goal is missed with 1 int16 weight, drop +0.1" in done.stdout
    assert "int16/fp16: 3 operators in fp16 reduce the drop of all-int16 with 1 int16 weight to +0.0" in done.stdout
    best = re.search(r"^decision     int8/int16: trial \d+ meets .* and 1 int16 weight beside 3", done.stdout, re.M)
    assert best, done.stdout


@pytest.mark.slow
def test_a_weight_that_fp16_uncovers_is_raised_too(tmp_path):
    """Beside the errors of the tone, which fp16 removes, nobody sees those of the weight."""
    done = run_qflow("tune", "+experiment=int16_fp16", *TONED, *WIDE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^decision     all-int16: .* int16/fp16 is next", done.stdout, re.MULTILINE)
    assert "int16/fp16: 3 operators in fp16 reduce the drop of all-int16 with 1 int16 weight to +0.0" in done.stdout


@pytest.mark.slow
def test_int16_weights_that_were_not_tried_are_named_beside_a_miss(tmp_path):
    done = run_qflow("tune", "+experiment=int8", *TASK, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "int16 weights (+experiment=int8_int16)" in re.search(r"^not tried +(.*)", done.stdout, re.MULTILINE)[1]
