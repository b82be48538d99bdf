"""An operator has one name wherever it stands: the one that its qconfig line takes. All reports count them alike."""

import csv
import json
import re

import pytest
from support.commands import run_qflow
from support.many_names import Data, model

import qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own

TASK = [
    "task=custom", "task.name=names", "task.model._target_=support.many_names.model",
    "task.data._target_=support.many_names.Data", "task.metric._target_=support.many_names.Off", "calibration.steps=4",
    "calibration.batch_size=8", "executor.threads=1",
]  # fmt: skip
COLUMNS = ("op", "op_name", "Name", "mod_name")


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The consoles of a study, a check and a cost report, and all tables that they leave."""
    folder = tmp_path_factory.mktemp("names")
    study = ["+experiment=int8_int16", "study=names/all", "search.n_trials=3", "search.enqueue=[]"]
    commands = {"tune": [*study, "objective.max_drop=0.004"], "check": [], "cost": []}
    done = {name: run_qflow(name, *TASK, *more, cwd=folder) for name, more in commands.items()}
    assert all(d.returncode in (0, 1) for d in done.values()), [d.stdout + d.stderr for d in done.values()]
    files = [p for p in (folder / "qflow_out").rglob("*") if p.suffix in (".json", ".csv")]
    return done, files, folder / "qflow_out"


@pytest.fixture(scope="module")
def graph():
    return qflow.prepare(model(), Data.calibration[0][0][None]).graph


def names_in(path):
    """Return the names in the columns of operators of a table."""
    if path.suffix == ".csv":
        with path.open() as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
        return {row[name] for row in rows for name in COLUMNS if name in row}
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or "columns" not in found:
        return set()
    places = [place for place, name in enumerate(found["columns"]) if name in COLUMNS]
    return {row[place] for row in found["data"] for place in places}


def test_every_name_in_every_table_is_that_of_the_qconfig(walked, graph):
    """Beside the operators: values inside them, further calls of a shared module, and what has no precision."""
    _, files, _ = walked
    qconfig = {node.name for node in graph.quantized}
    inner = {name for node in graph.nodes for name in node.inner}
    calls = {node.name for node in graph.nodes}
    members = {name for node in graph.nodes for name in node.fused}
    assert "norm.rsqrt" in inner and {"first.act(1)", "pool"} < calls and "stem.1" in members
    tables = {path: names_in(path) for path in files}
    for path, names in tables.items():
        layers = path.name.startswith("compare_per_layer")
        allowed = qconfig | inner | {"model"} | (calls if layers or path.name.startswith("cost") else set())
        assert names - allowed <= (members if layers else set()), path
    assert sum(bool(names & qconfig) for names in tables.values()) > 8


def test_the_members_of_a_fused_group_stand_in_the_model_check(walked, graph):
    _, _, root = walked
    check = json.loads((root / "check" / "names" / "model_check.json").read_text())
    assert {row["op"]: row["fused"] for row in check["rows"] if row["fused"]} == {
        node.name: ", ".join(node.fused) for node in graph.quantized if node.fused
    }


def test_findings_of_a_study_know_what_its_calibration_compared(walked):
    _, files, _ = walked
    studies = [path.read_text() for path in files if path.name == "findings.json" and path.parent.name == "artifacts"]
    assert studies and all("case" in text and "compare its calls" not in text for text in studies)


def test_every_report_counts_the_same_operators(walked, graph):
    done, files, root = walked
    count = graph.n_operators
    assert re.search(rf"^check +{count} operators ", done["tune"].stdout, re.MULTILINE)
    assert re.search(rf"^model +{count} operators, .*\nqconfig +{count} rows", done["check"].stdout, re.MULTILINE)
    assert f"of {count} operators)" in (root / "studies" / "names" / "all" / "decision.md").read_text()
    assert json.loads((root / "check" / "names" / "model_check.json").read_text())["operators"] == count
    qconfigs = [json.loads(path.read_text())["ops"] for path in files if path.name == "qconfig.json"]
    assert {len(ops) for ops in qconfigs} == {count} and len(qconfigs) == 3
