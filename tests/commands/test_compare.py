"""Trials side by side, as files, runs and aliases."""

import shutil

import pytest
import torch
from support.commands import run_qflow
from support.documents import document
from support.stored import store_trial

from qflow.bundle.source import fetch
from qflow.bundle.stored import record_of

pytestmark = pytest.mark.slow  # works with a store


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder, and the runs of an all-int8 and of an all-int16 trial."""
    folder = tmp_path_factory.mktemp("two")
    points = [{"qconfig.int16_ratio": ratio} for ratio in (0.0, 1.0)]
    return folder, *(store_trial(folder / "qflow_out", "task=digits", point=point)[0] for point in points)


def asked(folder, *arguments):
    done = run_qflow("compare", *arguments, cwd=folder)
    return done, document(done) if "--json" in arguments else done.stdout


def test_two_mixes_differ_in_cost_and_operators_with_what_each_gains(two):
    folder, int8, int16 = two
    done, found = asked(folder, int8, f"runs:/{int16}", "--json", "--check")
    assert (done.returncode, found["exit_code"], found["result"]["equal"]) == (1, 1, False)
    (one,) = found["result"]["comparisons"]
    metrics = {m["name"]: m for m in one["metrics"]}
    stored = [fetch(run, root=folder / "qflow_out") for run in (int8, int16)]
    for name, metric in metrics.items():
        assert (metric["before"], metric["after"]) == tuple(trial.metrics[name] for trial in stored), name
    bpu = [trial.metrics["cost/bpu_ms"] for trial in stored]
    assert one["bpu"]["ratio"] == pytest.approx(bpu[1] / bpu[0], rel=1e-3)
    assert one["bpu"]["low"] <= one["bpu"]["ratio"] <= one["bpu"]["high"]
    assert {op["op"] for op in one["operators"]} == set(stored[0].qconfig.diff(stored[1].qconfig))
    raised = [op for op in one["operators"] if op["before"].startswith("qint8") and op["after"].startswith("qint16")]
    assert raised
    assert all(op["after_ms"] is not None for op in raised)
    assert metrics["accuracy/drop"]["how"] == "paired by sample"


def test_a_trial_equals_itself_whatever_it_is_called(two):
    folder, int8, _ = two
    done, text = asked(folder, int8, f"runs:/{int8}", "--check")
    assert done.returncode == 0, done.stderr
    assert "operators   0 of" in text
    assert text.splitlines()[-1].startswith("equal")


def test_folders_and_qconfig_files_are_sources_too_and_a_page_is_written(two, tmp_path):
    folder, int8, int16 = two
    trial = fetch(int16, root=folder / "qflow_out")
    copied = tmp_path / "leaves"
    shutil.copytree(trial.folder, copied)
    (copied / "bundle.json").write_text(record_of(trial))
    json_file = copied.parent / "mix.json"
    shutil.copy(copied / "qconfig" / "qconfig.json", json_file)
    done, found = asked(folder, int16, str(copied), str(json_file), int8, "--json", f"out={tmp_path}/page.html")
    assert done.returncode == 0, done.stderr
    same, bare, other = found["result"]["comparisons"]
    assert same["operators"] == bare["operators"] == [] != other["operators"]
    assert bare["notes"] == ["qconfig of mix.json has no figures: only qconfigs are compared"]
    page = (tmp_path / "page.html").read_text()
    assert all(op["op"] in page for op in other["operators"])
    assert page.count("<script>") == 1 and "<h2>" in page  # its own script alone
    assert "of the first&#x27;s BPU time" in page


def test_a_file_of_the_plugin_is_compared_under_the_operators_of_the_trial(two, tmp_path):
    folder, int8, _ = two
    torch.save({"conv1": "qint16", "conv2": {"output": "qint8"}, "gone": "qint8"}, tmp_path / "qconfig_dtypes.pt")
    done, found = asked(folder, int8, f"{tmp_path}/qconfig_dtypes.pt", "--json")
    assert done.returncode == 0, done.stderr
    (one,) = found["result"]["comparisons"]
    (op,) = one["operators"]
    assert (op["op"], op["before"], op["after"]) == ("conv1", "qint8/qint8", "qint16/qint8")
    done, text = asked(folder, f"{tmp_path}/qconfig_dtypes.pt", int8)
    assert "file        not in the model: gone\n" in text
    assert "first       dtypes of the plugin of qconfig_dtypes.pt\n" in text
    assert "file        not in the file, taken as in the other: " in text


WRONG = {
    "": "At least two trials are compared, but got none.",
    "abc": "At least two trials are compared, but got abc.",
    "abc def": "a folder or a .zip, but got abc. Name one that exists.",
    "no.json no.json": "A .json file holds a qconfig that qflow wrote, but got no.json",
    "a.pt b.py": "A file is compared with a trial, whose operators it names, but got a.pt and none. Name a run too.",
    "abc def nothing=1": "A key must exist in the configuration, but got nothing.",
    "abc def --chekc": "but got --chekc. Did you mean --check?",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_gets_one_line_and_code_2(line, tmp_path):
    done = run_qflow("compare", *line.split(), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert WRONG[line] in done.stderr
    assert done.stderr.count("\n") == 1
