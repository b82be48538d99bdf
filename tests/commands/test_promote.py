"""What promote judges, registers, takes back and leaves to another promotion; how the registered model is used."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.compose import compose
from support.documents import fits
from support.stored import store_trial, uri_of

import qflow
from qflow.commands.promote import Promotion, against, promote
from qflow.core.errors import ConfigError, PromotionError, TrackingError
from qflow.study.gate import Judged, Rules, Scores, against_champion, broken_rules, stricter
from qflow.study.rebuild import differing_parts
from qflow.study.verdict import Verdict
from qflow.tracking.artifacts import Store
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.registry import Version, champion


def test_a_rebuild_asks_for_the_report_of_the_run():
    same = {"weights": "w", "data": "d"}
    now = {**same, "profile": "abc"}
    assert differing_parts(now, {**same, "profile": "abc"}) == []
    assert differing_parts(now, {**same, "profile": "def"}) == [
        "measured times are not those of the run: abc instead of def"
    ]
    assert differing_parts(now, same) == ["measured times are not those of the run: abc instead of none"]


# ---- the gate ------------------------------------------------------------------------------------------------------


def test_the_goal_at_promote_is_at_least_the_studys():
    study = {"max_drop": 0.01, "max_latency_ms": None, "max_slowdown": 1.2, "max_int16_mac_share": 0.5}
    none = dict.fromkeys((*study, "max_traffic_mb"))
    assert stricter(study, none).max_drop == 0.01
    goal = stricter(study, {**none, "max_drop": 0.005, "max_latency_ms": 2.0})
    assert (goal.max_drop, goal.max_latency_ms, goal.max_int16_mac_share) == (0.005, 2.0, 0.5)
    assert goal.max_slowdown == 1.2 and stricter(study, {**none, "max_slowdown": 1.1}).max_slowdown == 1.1
    for laxer in ({"max_drop": 0.02}, {"max_slowdown": 1.3}, {"max_int16_mac_share": 0.6}):
        with pytest.raises(ConfigError, match=f"objective.{next(iter(laxer))} at promote is at most the study's"):
            stricter(study, {**none, **laxer})


BEFORE, AFTER = Scores(0.75, (1, 1, 0, 1), ("a", "a", "b", "b")), Scores(0.5, (1, 0, 1, 0), ("a", "a", "b", "b"))
BROKEN = {
    "max_class_drop": (0.4, 0.5, "class a loses 0.5, more than gate.max_class_drop 0.4"),
    "max_sample_drop": (0.5, 1.0, "sample 1 loses 1, more than gate.max_sample_drop 0.5"),
    "max_worse_share": (0.4, 0.5, "50.00% of the samples are worse, more than gate.max_worse_share 0.4"),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_rule_names_the_class_the_sample_and_the_share(rule, digits_task):
    too_little, enough, says = BROKEN[rule]
    assert broken_rules(Rules(**{rule: too_little}), digits_task, BEFORE, AFTER) == [says]
    assert broken_rules(Rules(**{rule: enough}), digits_task, BEFORE, AFTER) == []
    assert broken_rules(Rules(), digits_task, BEFORE, AFTER) == []
    with pytest.raises(ConfigError, match=f"gate.{rule} needs a metric that scores each sample"):
        broken_rules(Rules(**{rule: 1.0}), digits_task, Scores(0.75), Scores(0.5))
    with pytest.raises(ConfigError, match="at least 0"):
        Rules(**{rule: -0.1})


def test_a_version_that_the_champion_dominates_is_rejected(digits_task):
    def reasons(metric, latency, **rules):
        return against_champion(Rules(**rules), digits_task, Judged(metric, latency, "d"), Judged(0.9, 2.0, "d"))

    assert reasons(0.91, 2.5) == reasons(0.89, 1.9) == reasons(0.9, 2.0) == []
    assert "as good or better in both: accuracy 0.9 against 0.89" in reasons(0.89, 2.0)[0]
    assert reasons(0.9, 2.1) and not reasons(0.9, 2.1, allow_dominated=True)
    assert "worse than the champion's, more than 0.005" in reasons(0.89, 1.0, max_worse_than_champion=0.005)[0]
    assert "0.5 ms above the champion's, more than 0.2" in reasons(0.95, 2.5, max_slower_than_champion_ms=0.2)[0]


UNUSABLE = ['{"data":"d","latency_ms":NaN,"metric":NaN}', '{"data":"d","latency_ms":"inf","metric":0.5}', "[" * 10_000,
            '{"data":"d","latency_ms":1' + "0" * 400 + ',"metric":0.5}', "[1]", "", "x"]  # fmt: skip


@pytest.mark.parametrize("text", UNUSABLE, ids=range(len(UNUSABLE)))
def test_what_a_champion_is_known_by_is_data_and_no_number_that_is_missing_wins(text, digits_task):
    champion = Version(1, "run", {"qflow.judged": text})
    strict = Rules(max_worse_than_champion=0.0)
    for rules, named, word in ((Rules(), True, "ACCEPT"), (Rules(), False, "REJECT"), (strict, True, "REJECT")):
        verdict = Verdict()
        against(verdict, champion, Judged(0.5, 1.0, "d"), rules, digits_task, named)
        assert verdict.word == word
        assert "judged on other data or not at all" in [*verdict.notes, *verdict.rejected][0]


def test_a_sample_without_a_number_breaks_the_rules_on_samples(digits_task):
    before, after = Scores(1.0, (1.0, 1.0), ("a", "b")), Scores(1.0, (1.0, math.nan), ("a", "b"))
    for rule in ("max_sample_drop", "max_class_drop", "max_worse_share"):
        assert len(broken_rules(Rules(**{rule: 0.4}), digits_task, before, after)) == 1


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store with a study of two trials, all-int8 (the best) and all-int16."""
    folder = tmp_path_factory.mktemp("store")
    int8, _ = store_trial(folder, "task=digits", "study=first")
    int16, _ = store_trial(folder, "task=digits", "study=second", point={"qconfig.int16_ratio": 1.0})
    MlflowTracker.open(None, folder, "other").open_study("first", tags={}, params={}, description="")
    return folder, int8, int16


def run(folder, *overrides):
    return record_of(folder, *overrides)[0]


def record_of(folder, *overrides):
    return fits("promote", promote(compose(f"root={folder}", *overrides, name="promote")))


def alias(folder, name, key="champion"):
    found = champion(Store.open(uri_of(folder), folder), name, key)
    return found.number if found else None


@pytest.mark.slow
def test_a_run_is_registered_and_taken_back(stored, capsys):
    folder, int8, int16 = stored
    with pytest.raises(TrackingError, match="but got first in digits, other. Add tracking.experiment=digits"):
        run(folder, "study=first")
    Store.open(uri_of(folder), folder).client.log_metric(int8, "board/latency_ms", 1.5)
    assert run(folder, "study=first", "tracking.experiment=digits", "dry_run=true") == 0
    out = capsys.readouterr().out
    assert "nothing is registered" in out and alias(folder, "digits") is None
    assert "note        not of the trial's result, and not compared: board/latency_ms" in out
    assert run(folder, "study=first", "tracking.experiment=digits") == 0
    out = capsys.readouterr().out
    assert "verdict     ACCEPT" in out and "digits version 1, alias champion moved" in out
    assert (
        "qflow.load('models:/digits@champion'" in out and "mlflow.pyfunc.load_model('models:/digits@champion')" in out
    )
    assert run(folder, f"run={int8}") == 0
    assert "is this run already" in capsys.readouterr().out
    code, found = record_of(folder, "study=second")  # as accurate, and slower
    assert (code, found["verdict"], found["run"], found["version"]) == (1, "REJECT", int16, None)
    assert found["reasons"] and found["model"] == "digits" and found["alias"] == "champion"
    out = capsys.readouterr().out
    assert "verdict     REJECT" in out and "the champion is as good or better in both" in out
    assert run(folder, "study=second", "gate.allow_dominated=true", "tracking.alias=candidate") == 0
    code, found = record_of(folder, "study=second", "gate.allow_dominated=true")
    assert (code, found["verdict"], found["reasons"], found["version"]) == (0, "ACCEPT", [], 3)
    assert "alias champion moved, before it version 1" in capsys.readouterr().out
    assert alias(folder, "digits") == 3
    assert record_of(folder, "study=second", "rollback=true") == (
        0, {"run": int8, "model": "digits", "version": 1, "alias": "champion", "dry_run": False},
    )  # fmt: skip
    assert "version 1, alias champion moved back from version 3" in capsys.readouterr().out
    with pytest.raises(PromotionError, match="is version 1, the first"):
        run(folder, "rollback=true", "tracking.registered_model=digits")
    version = Store.open(uri_of(folder), folder).client.get_model_version("digits", "3")
    assert version.tags["qflow.rolled_back"] and version.tags["qflow.run"] == int16 == version.run_id
    assert "Before it: version 1." in version.description and json.loads(version.tags["qflow.judged"])["latency_ms"]


@pytest.mark.slow
def test_a_study_has_no_best_trial_of_another_study(stored):
    folder, int8, int16 = stored
    store = Store.open(uri_of(folder), folder)
    study = store.studies("second")["digits"]
    store.client.set_tag(study, "qflow.best", int8)
    try:
        with pytest.raises(TrackingError, match="best trial of a study is one of its own, but got run .* of another"):
            run(folder, "study=second")
    finally:
        store.client.set_tag(study, "qflow.best", int16)


@pytest.mark.slow
def test_a_missed_goal_is_infeasible_and_a_broken_rule_rejected(stored, capsys):
    folder, _, int16 = stored
    mine = ["tracking.registered_model=gated"]
    assert run(folder, f"run={int16}", "objective.max_latency_ms=0.001", *mine) == 1
    out = capsys.readouterr().out
    assert "verdict     INFEASIBLE" in out and "max_latency_ms 0.001) is missed" in out
    with pytest.raises(ConfigError, match="at most the study's, 0.01, but got 0.5"):
        run(folder, f"run={int16}", "objective.max_drop=0.5", *mine)
    assert alias(folder, "gated") is None


@pytest.mark.slow
def test_of_two_at_once_one_wins(stored, tmp_path, monkeypatch):
    """Both have been judged against the same champion before either registers."""
    folder, *runs = stored
    judged, ends, together = [], [], threading.Barrier(2)
    register = Promotion.register

    def keep(self, store, *arguments):
        copied = shutil.copytree(self.model, tmp_path / str(len(judged)))
        judged.append((replace(self, model=Path(copied)), *arguments))
        return 0

    monkeypatch.setattr(Promotion, "register", keep)
    for one in runs:
        assert run(folder, f"run={one}", "tracking.registered_model=raced", "gate.allow_dominated=true") == 0

    def end(promotion, *arguments):
        together.wait(100)
        try:
            ends.append(register(promotion, Store.open(uri_of(folder), folder), *arguments))
        except PromotionError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=end, args=arguments) for arguments in judged]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (version,) = [found for found in ends if isinstance(found, int)]
    (lost,) = [found for found in ends if found != version]
    assert alias(folder, "raced") == version
    assert f"which gave champion of raced to version {version}" in lost


@pytest.mark.slow
def test_the_registered_model_serves_mlflows_own_ways(stored, tmp_path):
    import mlflow
    import pandas as pd
    from mlflow.metrics import MetricValue, make_metric

    folder, int8, _ = stored
    assert run(folder, f"run={int8}", "tracking.registered_model=served") == 0
    source = "models:/served@champion"
    loaded = qflow.load(source, uri=uri_of(folder))
    images = torch.rand(12, 1, 8, 8)
    wanted = loaded(images).detach().numpy()
    mlflow.set_tracking_uri(uri_of(folder))
    model = mlflow.pyfunc.load_model(source)
    assert model.metadata.signature.inputs.input_names() == ["image"]
    assert model.metadata.signature.outputs.input_names() == ["output"]
    assert np.array_equal(model.predict({"image": images.numpy()}), wanted)
    example = model.input_example
    assert model.predict(example).shape == (1, 10)
    table = pd.DataFrame({"image": [image.flatten().tolist() for image in images]})
    assert np.array_equal(model.predict(table), wanted)

    table["label"] = wanted.argmax(1)

    def share(predictions, targets, metrics):
        return MetricValue(aggregate_results={"share": float((predictions == targets).mean())})

    found = mlflow.models.evaluate(
        source, table, targets="label", model_config={"predict": "class"},
        extra_metrics=[make_metric(eval_fn=share, greater_is_better=True, name="equal")],
    )  # fmt: skip
    assert found.metrics["equal/share"] == 1.0

    (tmp_path / "in.json").write_text(json.dumps({"inputs": {"image": images.tolist()}}))
    command = ["-m", "mlflow", "models", "predict", "-m", source, "-i", "in.json", "-o", "out.json", "-t", "json"]
    done = subprocess.run(
        [sys.executable, *command, "--env-manager", "local"], cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env={**os.environ, "MLFLOW_TRACKING_URI": uri_of(folder), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.allclose(json.loads((tmp_path / "out.json").read_text())["predictions"], wanted, atol=1e-6)


def test_nothing_is_unpickled_where_stored_trials_are_read():
    root = Path(qflow.__file__).parent
    for path in [*(root / "bundle").glob("*.py"), *(root / "api" / n for n in ("load.py", "pyfunc.py"))]:
        for word in ("import pickle", "torch.load", "joblib", "cloudpickle", "numpy.load", "np.load", "yaml.load"):
            assert word not in path.read_text(), path
