"""python -m qflow.analyze as a user runs it: its files, its MLflow run, its page, and mistakes in one line."""

import json

import pytest
import torch
from support.commands import CUSTOM, run_qflow
from support.documents import document

from qflow.core.table_setter import table_rows
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # starts commands as processes of their own

FEW = ["sensitivity.bad_cases=4", "sensitivity.search_samples=32"]
WRITTEN = [
    *("badcase.txt", "badcase.pt", "all_badcase_info.pt", "badcases.png"),
    *("compare_per_layer_out.txt", "compare_per_layer_out.csv", "error_along_network.png"),
    *("sensitivity.txt", "output_scores_L1_sensitive_ops.pt", "sensitivity.png"),
    *("advice.txt", "histogram_0.png", "analysis.html"),
]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analyze")
    return run_qflow("analyze", *CUSTOM, *FEW, cwd=folder), folder


def test_all_files_are_written_and_mlflow_holds_them(done):
    result, folder = done
    assert result.returncode == 0, result.stdout + result.stderr
    out = folder / "qflow_out" / "analyze" / "own"
    assert all((out / name).stat().st_size > 0 for name in WRITTEN)
    tracker = MlflowTracker.open(None, folder / "qflow_out", "own")
    run = tracker.find_study("own/analyze")
    kept = {artifact.path for artifact in tracker.client.list_artifacts(run)}
    assert kept >= set(WRITTEN)
    tables = {entry["path"] for entry in json.loads(tracker.run_tags(run)["mlflow.loggedArtifacts"])}
    assert tables >= {"compare_per_layer.json", "sensitivity.json"}


def test_the_planted_operator_is_found_advised_on_and_mended(done):
    """`loud` drowns a channel (tests/support/models.py): first in the table, first in the advice, and it helps."""
    result, folder = done
    out = folder / "qflow_out" / "analyze" / "own"
    rows = torch.load(out / "output_scores_L1_sensitive_ops.pt", weights_only=True)
    assert table_rows(rows)[0].op_name == "loud"
    advice = json.loads((out / "advice.json").read_text())
    assert advice[0]["line"] == "qconfig.modules={loud: qint16}"
    assert "loud: rounding (activation" in result.stdout
    before, after = (
        float(w) for w in result.stdout.split("changes the outputs' distance to float from ")[1].split()[:3:2]
    )
    assert after < 0.2 * before
    assert "The error starts to grow at loud." in (out / "compare_per_layer_out.txt").read_text()


def test_the_line_that_is_advised_can_be_given_to_a_command(done, tmp_path):
    advice = json.loads((done[1] / "qflow_out" / "analyze" / "own" / "advice.json").read_text())
    checked = run_qflow("check", *CUSTOM, advice[0]["line"], cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    record = json.loads((tmp_path / "qflow_out" / "check" / "own" / "model_check.json").read_text())
    assert {row["op"]: row["applied"] for row in record["rows"]}["loud"] == "qint16"


def test_stages_and_filters_are_chosen(tmp_path):
    mix = ["qconfig.error_share=0.5", "+experiment=int8_int16"]  # its search is not for this command
    result = run_qflow("analyze", *CUSTOM, *FEW, *mix, "stages=[layers]", cwd=tmp_path)
    assert result.returncode == 0 and "qconfig picks operators by their order" in result.stdout, (
        result.stdout + result.stderr
    )
    result = run_qflow("analyze", *CUSTOM, *FEW, "stages=[layers]", "prefixes=[loud]", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    out = tmp_path / "qflow_out" / "analyze" / "own"
    assert not (out / "sensitivity.txt").exists()
    lines = (out / "compare_per_layer_out.csv").read_text().splitlines()
    assert len(lines) == 2
    assert ", loud, " in lines[1]


def test_the_advised_mix_is_analysed_as_the_next_model(done, tmp_path):
    """The guide's loop: raise what the advice names, and debug the mixed model."""
    result = run_qflow("analyze", *CUSTOM, *FEW, "qconfig.modules={loud: qint16}", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (out,) = (tmp_path / "qflow_out" / "analyze").glob("own-*")
    rows = json.loads((out / "sensitivity_record.json").read_text())["rows"]
    assert [r["quant_dtype"] for r in rows if (r["op_name"], r["sensitive_type"]) == ("loud", "activation")] == [
        "qint16"
    ]
    moved = [float(result.stdout.split("distance to float from ")[1].split()[0]) for result in (done[0], result)]
    assert moved[1] < 0.2 * moved[0]


def test_the_users_own_metric_chooses_the_bad_cases(tmp_path):
    own = ["sensitivity.own_metric._target_=user_task.largest", "sensitivity.own_metric.order=descending"]
    result = run_qflow("analyze", *CUSTOM, *FEW, *own, "stages=[badcase]", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    text = (tmp_path / "qflow_out" / "analyze" / "own" / "badcase.txt").read_text()
    first = next(line.split() for line in text.splitlines() if line.startswith("scores"))
    assert "by custom" in result.stdout and len(first) == 7


def test_files_of_other_stages_are_gone_from_the_folder_and_the_run(tmp_path):
    for stages, present, absent in (
        ("[layers,sensitivity]", {"sensitivity.txt", "compare_per_layer_out.txt"}, {"advice.txt"}),
        ("[badcase]", {"badcase.txt"}, {"sensitivity.txt", "compare_per_layer_out.txt", "advice.txt"}),
    ):
        result = run_qflow("analyze", *CUSTOM, *FEW, f"stages={stages}", cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
        tracker = MlflowTracker.open(None, tmp_path / "qflow_out", "own")
        run = tracker.find_study("own/analyze")
        kept = {artifact.path for artifact in tracker.client.list_artifacts(run)}
        assert kept >= present and not kept & absent
        tables = {entry["path"] for entry in json.loads(tracker.run_tags(run)["mlflow.loggedArtifacts"])}
        assert tables <= kept


def test_what_int16_cannot_hold_is_advised_fp16(tmp_path):
    """The energy of a dark picture (tasks/exposure.py) underflows at int16: the guide raises it to fp16."""
    how = ["+experiment=int16_fp16", "task=exposure", "qconfig.template=qint16", "sensitivity.bad_cases=4"]
    result = run_qflow("analyze", *how, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    advice = json.loads((tmp_path / "qflow_out" / "analyze" / "exposure-qint16" / "advice.json").read_text())
    assert {(a["op"], a["spec"]) for a in advice} >= {(f"level[{op}]", "float16") for op in ("add", "mean", "square")}
    before, after = (
        float(w) for w in result.stdout.split("changes the outputs' distance to float from ")[1].split()[:3:2]
    )
    assert after < 0.05 * before


def test_following_an_estimate_is_measured_exactly(done, tmp_path):
    result = run_qflow("analyze", *CUSTOM, *FEW, "sensitivity=estimate", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    found = document(result)["result"]
    assert found["advice"][0]["op"] == found["sensitivity"][0]["op_name"] == "loud"
    rows = json.loads((done[1] / "qflow_out" / "analyze" / "own" / "sensitivity_record.json").read_text())["rows"]
    exact = {r["op_name"]: r["score"] for r in rows if r["sensitive_type"] == "activation"}
    text = (tmp_path / "qflow_out" / "analyze" / "own" / "advice.txt").read_text()
    (line,) = (line.split() for line in text.splitlines() if line.startswith("loud  ") and "qint16" in line)
    assert float(line[-2]) == pytest.approx(exact["loud"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["stages=[badcase]", "prefixes=[loud]"], "choose rows of the layer table, but got stages badcase"),
        (["qconfig.modules={nosuch: qint16}"], "but got nosuch"),
        (["sensitivity.compare=odd"], "sensitivity.compare is one of fair, raw, but got 'odd'"),
        (["sensitivity.own_metric._target_=user_task.largest"], "order is one of ascending, descending, but got ''"),
        (["stages=[everything]"], "stages is one of badcase, layers, sensitivity, advice, qat_debug, but got"),
        (["sensitivity.method=fast"], "sensitivity.method is one of exact, screened, estimate, point, but got 'fast'"),
        (["sensitivity=quick"], "but got"),
        (["sensitivity.dtypes=[int8]"], "sensitivity.dtypes is one of"),
        (["sensitivity.memory_mb=0"], "sensitivity.memory_mb"),
        (["sensitivity.metric=cosine"], "sensitivity.metric is one of"),
    ],
)
def test_mistakes_get_one_line(arguments, says, tmp_path):
    result = run_qflow("analyze", *CUSTOM, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stdout + result.stderr
    assert says in result.stderr
