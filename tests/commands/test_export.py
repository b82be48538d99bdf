"""`python -m qflow.export` on a stored trial."""

import json
from pathlib import Path

import pytest
from support.commands import OWN, run_qflow
from support.compose import compose
from support.documents import document
from support.stored import store_trial, uri_of

from qflow.bundle.source import fetch
from qflow.commands.export import loaded
from qflow.core.errors import BundleError

pytestmark = pytest.mark.slow  # works with a store, in processes


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run, _ = store_trial(folder / "qflow_out", "task=digits")
    return folder, run


def test_a_run_is_exported_to_several_targets(study, tmp_path):
    folder, run = study
    done = run_qflow("export", "target=plugin,qflow", f"from={run}", f"out={tmp_path / 'out'}", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plugin", "qflow"]
    assert f"run: {run}" in (tmp_path / "out" / "plugin" / "README.md").read_text()
    shown = " ".join(done.stdout.split())
    assert "not in the files: " in shown
    assert shown.count("Prepare the model with the plugin") == 1  # each reason once
    assert all(len(line) <= 80 or str(tmp_path) in line for line in done.stdout.splitlines()[1:])


def test_by_default_the_best_trial_is_exported_and_strict_says_what_is_missing(study):
    folder, run = study
    done = run_qflow("export", "target=plugin", "task=digits", "strict=true", cwd=folder)
    assert (done.returncode, done.stderr) == (1, "")
    assert f"runs:/{run}" in done.stdout
    record = json.loads((folder / "qflow_out" / "export" / "plugin" / "export.json").read_text())
    assert record["unexpressed"]
    done = run_qflow("export", "target=qflow", "task=digits", "strict=true", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_script_gets_what_is_missing(study):
    done = run_qflow("export", "target=hmct", "task=digits", "--json", cwd=study[0])
    result = document(done)["result"]
    assert result["run"] == study[1]
    assert "quant_config.json" in result["targets"]["hmct"]["files"]


def test_a_study_goes_to_another_store_as_one_file(study, tmp_path):
    bundled = run_qflow("export", "study=digits/int8_int16", f"bundle={tmp_path / 'study.zip'}", cwd=study[0])
    assert (bundled.returncode, bundled.stderr) == (0, "")
    imported = run_qflow("export", f"import={tmp_path / 'study.zip'}", "--json", cwd=tmp_path)
    assert imported.returncode == 0 and document(imported)["result"]["study"] == "digits/int8_int16"
    done = run_qflow("export", "study=digits/int8_int16", "target=qflow", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "qflow_out" / "export" / "qflow" / "qflow.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["target=plugin,tensorrt"], "A target is one of plugin, plugin35"),
        (["from=nothing"], "but got nothing. Name one that exists."),
        (["study=other"], "nor a best trial of other"),
    ],
)
def test_a_mistake_is_one_line(study, arguments, said):
    done = run_qflow("export", *arguments, cwd=study[0])
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_code_of_a_trial_runs_if_this_command_line_names_or_allows_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support"))
    own = [word for word in OWN if not word.startswith(("+", "calibration."))]
    run, _ = store_trial(tmp_path, *own)
    trial = fetch(run, uri=uri_of(tmp_path))
    with pytest.raises(BundleError, match=r"security\.allow=\[user_task\]"):
        loaded(compose("task=digits", name="export"), trial)
    stated = [word for word in own if word.startswith("task")]
    for words in (["security.allow=[user_task]"], stated):
        assert loaded(compose(*words, name="export"), trial).applied.digest == trial.qconfig.digest
