"""python -m qflow.cost as a user runs it: the table, a measured report, the fit, and bad requests in one line."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from support.commands import CUSTOM, run_qflow
from support.documents import document

from qflow.config.device_file import load_cost, load_rules
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # starts commands as processes of their own

DATA = Path(__file__).parents[2] / "benchmarks" / "data" / "j6m-networks.csv"


def rows(folder):
    with (folder / "qflow_out" / "cost" / "own" / "cost.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_users_model_is_priced(tmp_path):
    done = run_qflow("cost", *CUSTOM, "qconfig.template=qint16", "fps=30", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(tmp_path)
    total = sum(float(row["Time (ms)"]) for row in table)
    assert f"({total + 0.050277:.3f} ms on the BPU)" in done.stdout
    assert {row["Engine"] for row in table} >= {"TAE", "VAE"}
    assert "GB/s at 30 frames/s" in done.stdout
    assert "to all-int8" in done.stdout
    folder = tmp_path / "qflow_out" / "cost" / "own"
    assert (folder / "promotions.csv").read_text().startswith("Name,Time for qint16 (ms)")
    assert (folder / "cost.png").stat().st_size > 0
    tracker = MlflowTracker.open(None, tmp_path / "qflow_out", "own")
    name = next(line for line in done.stdout.splitlines() if line.startswith("written")).split("MLflow run ")[1]
    run = tracker.find_study(name)
    assert tracker.run_params(run)["qconfig.template"] == "qint16"
    for file in ("config.yaml", "cost.png", "cost_record.json"):
        assert tracker.download(run, file, tmp_path / "got").stat().st_size > 0
    for shown in ("cost.json", "promotions.json"):
        assert f'"{shown}"' in tracker.run_tags(run)["mlflow.loggedArtifacts"]


def test_only_what_the_device_keeps_at_int16_is_priced(tmp_path):
    done = run_qflow(
        "cost", "task=custom", "task.name=own", "task.model._target_=support.many_names.model",
        "task.data._target_=support.many_names.Data", "task.metric._target_=support.many_names.Off", cwd=tmp_path,
    )  # fmt: skip
    folder = tmp_path / "qflow_out" / "cost" / "own"
    priced = {row[0] for row in json.loads((folder / "promotions.json").read_text())["data"]}
    assert "[interpolate]" not in priced and {"quant[image]", "[add](2)"} <= priced
    assert re.search(r"not priced: \d+ operators, because nash-m would not keep int16 on them", done.stdout)


def report_of(tmp_path, layers):
    """A compiler's report in the layout of hbm_perf."""
    path = tmp_path / "perf.json"
    details = [{"layer name": name, "computing cost (no DDR)": cost} for name, cost in layers.items()]
    summary = {"performance": {"latency (ms)": 0.25, "FPS": 4000}, "layer details": details}
    path.write_text(json.dumps({"summary": {**summary, "model info": {"march": "nash-m"}}}))
    return path


def test_a_measured_report_replaces_the_formula(tmp_path):
    run_qflow("cost", *CUSTOM, cwd=tmp_path)
    name = next(row["Name"] for row in rows(tmp_path) if row["Operator"] == "conv")
    path = report_of(tmp_path, {f"{name}/Conv": "59 us (8.2% of model)", "foreign/Conv": "7 us"})
    done = run_qflow("cost", *CUSTOM, f"device.profile={path}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(row for row in rows(tmp_path) if row["Name"] == name)
    assert (float(row["Time (ms)"]), row["Source"]) == (pytest.approx(0.059), "measured")
    assert "unmatched   foreign/Conv: 0.0070 ms" in done.stdout
    assert "(0.250 ms on the BPU)" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mode=other"], "mode is one of report, fit, but got 'other'"),
        (["fps=0"], "fps is a number above 0, but got 0"),
        (["fit"], "A fit needs measured networks, but got none"),
        (["fit", "data=nowhere.csv"], "A fit reads a CSV file of networks, but got nowhere.csv"),
        (["device.profile=nowhere.json"], "nowhere.json"),
        (["device.cost.gmac_per_ms_ghz=0"], "cost.gmac_per_ms_ghz is a number above 0"),
        (["device.cost.vector_factors={qint8: [3, 1, 2]}"], "cost.vector_factors.qint8 is a number above 0 or"),
        (["device.cost.mac_factors={qint8/qint8: abc}"], "cost.mac_factors.qint8/qint8 is a number above 0 or"),
    ],
)
def test_bad_requests_get_one_line(arguments, says, tmp_path):
    done = run_qflow("cost", *CUSTOM, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert says in done.stderr


def test_a_report_of_another_model_is_refused(tmp_path):
    done = run_qflow("cost", *CUSTOM, f"device.profile={report_of(tmp_path, {'foreign/Conv': '7 us'})}", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert "A profile's layers carry the names of the model's modules, but got foreign/Conv" in done.stderr


def test_a_fit_renews_a_board_of_one_s_own_that_a_study_takes(tmp_path):
    """What the rows do not say (memory, clock) stays as the board's file has it; the host is in the latencies."""
    shutil.copy(DATA, tmp_path / "mine.csv")
    board = tmp_path / "mine.yaml"
    board.write_text(
        "defaults: [nash-e, _self_]\nrules: {float16_kinds: []}\n"
        "cost:\n  host_ms: 0.9\n  onchip_mb: 3\n  clock_ghz: 1.2\n"
    )
    done = run_qflow("cost", "fit", "data=mine.csv", "device=mine.yaml", "out=mine.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "family left out" in done.stderr and document(done)["result"]["written"] == str(board)
    found = load_cost(board)
    assert (round(found.host_ms, 3), found.onchip_mb, found.clock_ghz) == (0.249, 3, 1.2)
    assert found.provenance.startswith("fitted to 107 times")
    assert load_rules(board).float16_kinds == []
    priced = run_qflow("cost", *CUSTOM, "device=mine.yaml", cwd=tmp_path)
    assert priced.returncode == 0, priced.stdout + priced.stderr
    assert "spilled unknown" not in priced.stdout
