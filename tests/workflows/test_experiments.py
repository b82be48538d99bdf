"""Every experiment file, tiny: none rots."""
# Long: the experiments share what their studies print and store.

import json
import re

import pytest
from support.commands import FREE_BOUNDARIES, run_qflow

from qflow.config.explain import experiments

pytestmark = pytest.mark.slow  # starts commands as processes of their own


def tune(*arguments, cwd):
    done = run_qflow("tune", *arguments, "executor.threads=1", cwd=cwd)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    assert (cwd / "qflow_out" / "mlflow.db").exists()
    return done


def study_run(folder, name):
    from qflow.tracking.mlflow_tracker import MlflowTracker

    tracker = MlflowTracker.open(None, folder / "qflow_out", name.split("/")[0])
    return tracker, tracker.find_study(name)


@pytest.mark.parametrize("experiment", experiments())
def test_experiments_run_in_miniature(experiment, tmp_path):
    done = tune(f"+experiment={experiment}", "task=digits", "+debug=tiny", "repair=none", cwd=tmp_path)
    assert re.search(r"^decision     all-int(8|16): ", done.stdout, re.MULTILINE)
    tracker, run_id = study_run(tmp_path, f"digits/{experiment}")
    text = tracker.download(run_id, "decision.md", tmp_path / "got").read_text()
    assert "## Decisions" in text
    best = json.loads((tmp_path / "qflow_out" / "studies" / "digits" / experiment / "best.json").read_text())
    assert best["run"] == tracker.run_tags(run_id)["qflow.best"]
    runs = tracker.client.search_runs(
        [tracker.experiment_id],
        "tags.qflow.kind = 'trial' and status = 'FINISHED'",
        order_by=["metrics.`goal/rank` ASC"],
    )
    first, *others = [run.data for run in runs]
    assert [run.metrics["goal/rank"] for run in (first, *others)] == list(range(1, len(runs) + 1))
    if best["run"]:
        assert (runs[0].info.run_id, first.tags["qflow.best"], first.metrics["goal/meets"]) == (
            best["run"],
            "true",
            1.0,
        )
    assert "true" not in [run.tags["qflow.best"] for run in others]
    front = json.loads((tmp_path / "qflow_out" / "studies" / "digits" / experiment / "pareto.json").read_text())
    assert {row[-1] for row in front["data"]} == {r.info.run_id for r in runs if r.data.tags["qflow.pareto"] == "true"}
    assert all("drop" in run.tags["mlflow.note.content"] for run in (first, *others))
    used = [{i.dataset.name for i in run.inputs.dataset_inputs} for run in runs]
    assert all(names == {"digits calibration", "digits evaluation"} for names in used)


def test_a_mix_is_searched_on_the_real_task(tmp_path):
    """The built-in detector on 128 pictures: int8 misses the goal by night, int16 meets it, the mix costs less."""
    done = tune(
        "+experiment=int8_int16", "+debug=tiny", "repair=none", "task.data.calibration_size=64",
        "+task.data.evaluation_size=128", "task.float_metric=null", "calibration.steps=4",
        "search.enqueue=[{qconfig.int16_ratio: 0.1}]", cwd=tmp_path,
    )  # fmt: skip
    drops = dict(re.findall(r"^(all-int16|all-int8) +0\.\d+ +([+-]0\.\d+)", done.stdout, re.MULTILINE))
    assert float(drops["all-int8"]) > 0.02 > float(drops["all-int16"])
    times = dict(re.findall(r"^(all-int16|best mix) +\S+ +\S+ +(\d\.\d+)", done.stdout, re.MULTILINE))
    verdict = re.search(
        r"latency     predicted, (\d+)% below all-int16 \((.*) of its BPU time \[(.*), (.*)\]\)", done.stdout
    )
    below = 100 * (1 - float(times["best mix"]) / float(times["all-int16"]))
    ratio, low, high = map(float, verdict.groups()[1:])
    assert int(verdict[1]) == pytest.approx(below, abs=1)
    assert low <= ratio <= high and ratio < 1.0


def test_evaluations_are_a_budget_and_what_was_evaluated_before_is_free(tmp_path):
    arguments = [
        "+experiment=int8",
        "task=dual",
        "repair=none",
        "+debug=tiny",
        "search.n_trials=5",
        "search.max_evaluations=3",
    ]
    done = tune(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "3 evaluations are run (search.max_evaluations)" in done.stdout
    assert "search.n_trials" in re.search(r"^goal .*missed.*", done.stdout, re.MULTILINE)[0]


EXPOSURE = ["+experiment=full", "task=exposure", FREE_BOUNDARIES, "search.n_trials=15"]


def test_where_int16_misses_the_tree_goes_to_fp16_and_keeps_it(tmp_path):
    done = tune(*EXPOSURE, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    missed = re.search(r"all-int16: misses the goal by (0\.\d+): int16 itself is too coarse on level\[", done.stdout)
    assert missed is not None, done.stdout
    assert 0.03 < float(missed[1]) < 0.1  # how the network was trained is up to the processor
    assert "3 operators in fp16 reduce the drop of all-int16 to" in done.stdout
    tracker, run_id = study_run(tmp_path, "exposure/full")
    best = tracker.run_tags(run_id)["qflow.best"]
    qconfig = json.loads(tracker.download(best, "qconfig/qconfig.json", tmp_path / "got").read_text())
    kept = {name for name, op in qconfig["ops"].items() if op["output"] == "float16"}
    assert kept == {"level[square]", "level[mean]", "level[add]"}
    assert tracker.run_metrics(best)["qconfig/n_int8"] >= 4
    again = tune(
        *EXPOSURE[:-1], "search.n_trials=16", cwd=tmp_path
    )  # everything before the trials comes from the cache
    assert "15 trials of an earlier start are kept" in again.stdout
    assert len(re.findall(r"^trial \d+", again.stdout, re.MULTILINE)) == 1
    assert re.search(
        r"badcases 3 of 3, calibration (\d+) of \1, .*float 1 of 1, .*repair .*, sensitivity 3 of 3", again.stdout
    )


def test_where_no_mix_is_enough_training_is_and_gives_int16_back(tmp_path):
    done = tune(
        "+experiment=full", "task=dual", "repair=none", "qat=dual", "qat.apply=after_search", "qat.steps=60",
        "search.rates=[1.0,1e-5]", FREE_BOUNDARIES, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"dual int16 suspected on conv3 \(weight 0.*, its input \[add\] 0.* at int8\), conv2 \(", done.stdout
    )
    assert re.search(
        r"learning rate: 1e-05 (is best|meets the goal) after 12 steps \(drop by rate 1e-05: ", done.stdout
    )  # the configured rate comes first
    assert re.search(r"demote: 5 int16 operators before, [34] after", done.stdout)
    tracker, run_id = study_run(tmp_path, "dual/full")
    best = tracker.run_metrics(tracker.run_tags(run_id)["qflow.best"])
    assert 0.0 < best["qat/steps"] <= 60.0
    assert best["accuracy/drop"] <= 0.01


def test_a_spent_budget_ends_the_tree_with_what_is_known(tmp_path):
    """Within int16/fp16 here, with a switch that only the baselines speak of."""
    done = tune(
        "+experiment=full", "task=exposure", "repair=none", "search.n_trials=6",
        "search.space.qconfig.modules.dense=choice(qint8,qint16)", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6 trials are run (search.n_trials)" in done.stdout
    assert re.search(r"^best mix +0\.9", done.stdout, re.MULTILINE)
    none = run_qflow("tune", "+experiment=int8", "task=digits", "search.timeout=1e-6", cwd=tmp_path)
    assert (none.returncode, none.stderr.count("\n")) == (2, 1), none.stdout + none.stderr
    assert "search.timeout" in none.stderr


def test_what_training_reached_is_not_taken_for_fp16_at_the_next_start(tmp_path):
    arguments = [
        "+experiment=int16_fp16", "task=dual", "repair=none",
        "+debug=tiny", "qat=dual", "qat.apply=after_search", "qat.steps=60",
        "search.n_trials=16", "search.rates=[1e-5]",
    ]  # fmt: skip
    first, second = (tune(*arguments, cwd=tmp_path) for _ in range(2))
    decisions = [re.findall(r"^decision .*", done.stdout, re.MULTILINE) for done in (first, second)]
    assert first.returncode == second.returncode == 0, first.stdout
    assert decisions[0] == decisions[1]
    assert "the goal is missed even with fp16" in "".join(decisions[0])


def test_the_best_training_gives_back_however_long_it_was(tmp_path):
    """The probe is as long as the training, which may end worse than where it was half way."""
    done = tune(
        "+experiment=full", "task=dual", "repair=none",
        "qat=dual", "qat.apply=after_search", "qat.steps=20", "search.probe_share=1",
        "search.rates=[1e-5]", "objective.max_drop=0.0125", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    met = re.findall(r"^trial \d+ QAT (?!given).* meets ", done.stdout, re.MULTILINE)
    assert met
    assert "decision     demote:" in done.stdout


def test_all_int8_stays_int8_and_leaves_trials_for_training(tmp_path):
    done = tune(
        "+experiment=int8", "task=dual", "repair=none",
        "+debug=tiny", "qconfig.error_share=interval(0,1)", "search.n_trials=10",
        "qat=dual", "qat.apply=after_search", "qat.steps=4", cwd=tmp_path,
    )  # fmt: skip
    lines = re.findall(r"^trial .*", done.stdout, re.MULTILINE)
    assert len(lines) == 10
    assert all("int16 0.00" in line for line in lines)
    assert "6 of 10 trials are run (search.n_trials), 4 are left for training" in done.stdout
    assert sum("QAT" in line for line in lines) == 4


@pytest.mark.parametrize("strategy", ["ratio", "assign"])
def test_where_another_calibration_meets_the_goal_nothing_is_promoted(strategy, tmp_path):
    done = tune(
        "+experiment=int8_int16", "task=digits", "repair=none", f"search={strategy}", "calibration.method=clip",
        "calibration.clip_min=-0.2", "calibration.clip_max=0.2",
        "search.space.calibration.method=choice(clip,minmax,mse)", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert re.search(
        r"^decision +all-int8: drop .* under (minmax|mse) meets the goal: no operator needs int16", done.stdout, re.M
    )
    assert len(re.findall(r"^trial ", done.stdout, re.MULTILINE)) == 3  # all-int16, all-int8, and the first that meets


@pytest.mark.proof
def test_ending_evaluations_early_changes_no_choice(tmp_path):
    """Trials that are compared are evaluated whole; those that only pass or fail may end early."""
    found = {}
    for early in ("false", "true"):
        folder = tmp_path / early
        folder.mkdir()
        done = tune(
            "+experiment=full", "task=exposure", "repair=none", "search=ratio", "search.n_trials=9",
            f"search.early_stop={early}", "task.batch_size=64", cwd=folder,
        )  # fmt: skip
        found[early] = done.stdout
    qconfigs = [re.search(r"^qconfig +(\w+)", text, re.MULTILINE)[1] for text in found.values()]
    assert qconfigs[0] == qconfigs[1]
    assert "stopped after" in found["true"]
    assert "stopped after" not in found["false"]


def test_what_costs_more_than_all_int16_is_not_evaluated(tmp_path):
    """At these shapes conversions make many mixes slower than all-int16, which meets the goal.

    After ten in a row one is measured, because a sampler learns from measured points only.
    """
    done = tune(
        "+experiment=int8_int16", "repair=none", "search=int16_ratio", "search.sampler=random", "search.n_trials=5",
        "search.enqueue=[]",
        "task.data.calibration_size=32", "+task.data.evaluation_size=32", "task.float_metric=null",
        "calibration.steps=4", "calibration.batch_size=8", cwd=tmp_path,
    )  # fmt: skip
    times = [float(ms) for ms in re.findall(r"^trial \d+ .* (\d+\.\d+) ms", done.stdout, re.MULTILINE)]
    assert len(times) == 5
    assert sum(ms > times[0] for ms in times) <= 1
    left_out = re.search(r"(\d+) left out that cost too much to be the best", done.stdout)
    assert left_out and int(left_out[1]) > 10, done.stdout


@pytest.mark.proof
def test_where_nothing_meets_ending_early_changes_neither_the_start_of_training_nor_the_nearest(tmp_path):
    found = {}
    for early in ("false", "true"):
        (tmp_path / early).mkdir()
        done = tune(
            "+experiment=int8_int16", "task=dual", "repair=none",
            "+debug=tiny", "search=ratio", "objective.max_drop=0.045",
            "objective.max_int16_mac_share=0.9", "qat=dual", "qat.apply=after_search", "qat.steps=4",
            "search.rates=[1e-4]", "task.batch_size=32", "calibration.method=mse", "search.n_trials=20",
            f"search.early_stop={early}", cwd=tmp_path / early,
        )  # fmt: skip
        found[early] = re.findall(r"^(?:nearest|decision     training: from|goal) .*", done.stdout, re.MULTILINE)
    assert found["false"] == found["true"]
    assert len(found["true"]) > 1


def test_no_training_where_a_budget_is_what_is_missed(tmp_path):
    done = tune(
        "+experiment=int8_int16", "task=dual", "repair=none", "+debug=tiny", "objective.max_drop=0.045",
        "objective.max_traffic_mb=0.001", "device.cost.onchip_mb=4", "qat=dual", "qat.apply=after_search",
        cwd=tmp_path,
    )  # fmt: skip
    assert "relax the budget or change the model" in done.stdout
    assert re.search(r"^decision +training: does not help: .* exceeds max_traffic_mb", done.stdout, re.MULTILINE)
    assert "QAT rate" not in done.stdout


def test_a_mix_of_an_error_share_is_demoted(tmp_path):
    done = tune(
        "+experiment=int8_int16", "task=dual", "repair=none",
        "+debug=tiny", "search=error_share", "objective.max_drop=0.045", FREE_BOUNDARIES,
        "objective.max_int16_mac_share=0.9", "search.enqueue=[{qconfig.error_share: 0.3}]", "search.n_trials=16",
        "qat=dual", "qat.apply=after_search", "qat.steps=60", "search.rates=[1e-4]", "calibration.method=mse",
        cwd=tmp_path,
    )  # fmt: skip
    assert "decision     demote:" in done.stdout, done.stdout
    assert "One rule says" not in done.stdout


def test_a_metric_that_nothing_identifies_stays_in_memory_and_is_still_analysed(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import threading\nfrom qflow.tasks.digits import Accuracy\n\n\nclass Metric(Accuracy):\n"
        "    def __init__(self):\n        self.lock = threading.Lock()\n"
    )
    for _ in range(2):
        done = tune(
            "+experiment=int16", "task=digits", "repair=none", "+debug=tiny", "task.metric._target_=mine.Metric",
            cwd=tmp_path,
        )  # fmt: skip
        assert "in memory only" in done.stdout
        assert re.search(r"^advice +\d+ operators stand out", done.stdout, re.MULTILINE), done.stdout


MISTAKES = {
    "training in the search and after it": (
        ["+experiment=int8_int16", "task=dual", "repair=none", "qat=dual", "search=qat", "qat.apply=after_search"],
        "search.space.qat.learned_scales=null",
    ),
    "fp16 by errors that are not measured": (
        ["+experiment=int16_fp16", "task=exposure", "sensitivity.dtypes=[qint8,qint16]"], "without float16",
    ),
    "a ratio that is searched beside an assignment": (
        ["+experiment=int8_int16", "task=dual", "repair=none",
         "qconfig.assignment=66666"], "search.space.qconfig.int16_ratio=null",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_contradiction_gets_one_line(case, tmp_path):
    arguments, says = MISTAKES[case]
    done = run_qflow("tune", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert says in done.stderr


def test_training_runs_in_miniature(tmp_path):
    from safetensors.torch import load_file

    done = run_qflow(
        "workflows.train_float", "+experiment=train_perception", "training.epochs=1",
        "task.data.calibration_size=9872", "+task.data.evaluation_size=64", "training.batch_size=32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stem.0.conv.weight" in load_file(tmp_path / "weights.safetensors")
