"""A trial with engine=plugin, from its evaluation over `compare --engine` to promote."""

import json
import sys
from contextlib import contextmanager

import pytest
import torch
from support.compose import compose
from support.documents import fits
from support.installed_plugin import installed
from support.stored import store_trial

from qflow.bundle.source import fetch
from qflow.commands.compare import compare
from qflow.commands.promote import promote
from qflow.core.errors import ConfigError
from qflow.study.fingerprint import fingerprint

pytestmark = pytest.mark.slow  # works with a store


@contextmanager
def rounding_up():
    """A plugin that rounds otherwise, so that its metric is not that of qflow's engine with the same scales."""
    with installed():
        from horizon_plugin_pytorch.quantization import fake_quantize

        fake_quantize.rounded = lambda x, s, dtype: torch.clamp(torch.floor(x / s + 0.8), dtype.min, dtype.max) * s
        yield


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store with a study of one trial that the plugin has evaluated."""
    folder = tmp_path_factory.mktemp("plugin")
    with rounding_up():
        run, evaluator = store_trial(folder, "task=digits", "engine=plugin")
    return folder, run, evaluator


def test_the_trial_names_its_engine_and_holds_the_log_of_its_calls(stored):
    folder, run, _ = stored
    trial = fetch(run, root=folder)
    calls = json.loads((trial.folder / "plugin_calls.json").read_text())
    assert trial.config.engine == "plugin" and trial.manifest["engine"] == "horizon_plugin_pytorch 3.0.17"
    assert [c["name"] for c in calls if c["name"] in ("set_march", "prepare")] == ["set_march", "prepare"]
    state = fingerprint(trial.config, trial.manifest)
    assert (state["engine"], state["engine.version"]) == ('"plugin"', "horizon_plugin_pytorch 3.0.17")
    trial.config.engine = "qflow"
    before = {name: value for name, value in trial.manifest.items() if name != "engine"}
    assert "engine" not in "".join(fingerprint(trial.config, before))  # studies without an engine's name continue


def test_two_engines_are_compared_on_it_operator_by_operator(stored, capsys):
    folder, run, evaluator = stored
    with rounding_up():
        made = compare(compose(f"sources=[{run}]", "engine=true", f"root={folder}", name="compare"))
    code, found = fits("compare", made)
    out = capsys.readouterr().out
    assert code == 0 and found["engines"] == ["qflow", "horizon_plugin_pytorch 3.0.17"]
    assert {row["op"] for row in found["rows"]} == {node.name for node in evaluator.graph.quantized}
    sizes = [row["output"] for row in found["rows"]]
    assert sizes == sorted(sizes, reverse=True) and 0 < sizes[0] < 0.2
    (weight,) = {round(row["weight_scale"], 4) for row in found["rows"] if row["weight_scale"]}
    assert weight == 0.0039  # 128 / 127.5
    assert "operators   6 of 6 differ, by their outputs on 128 samples" in out


def test_promote_rebuilds_it_with_the_plugin_or_says_that_there_is_none(stored, monkeypatch, capsys):
    folder, run, _ = stored
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "horizon_plugin_pytorch", None)
        with pytest.raises(ConfigError, match="needs horizon_plugin_pytorch, but got none installed here"):
            promote(compose(f"root={folder}", f"run={run}", name="promote"))
    with rounding_up():
        assert promote(compose(f"root={folder}", f"run={run}", name="promote"))[0] == 0
    out = capsys.readouterr().out
    assert "verdict     ACCEPT" in out
    assert "note        loaded by qflow, accuracy/accuracy is 0.991625; by the plugin 0.98995" in out
