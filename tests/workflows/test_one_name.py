"""An operator has one name wherever it stands: the one that its qconfig line takes. All reports count them alike."""

import csv
import json

import pytest
from support.commands import run_qflow

from qflow.core.qconfig import QConfig
from qflow.core.record import from_dict

pytestmark = pytest.mark.slow  # starts commands as processes of their own

TASK = [
    "task=custom", "task.name=names", "task.model._target_=support.many_names.model",
    "task.data._target_=support.many_names.Data", "task.metric._target_=support.many_names.Off", "calibration.steps=4",
    "calibration.batch_size=8", "executor.threads=1",
]  # fmt: skip
COLUMNS = ("op", "op_name", "Name", "mod_name")
NO_OPERATOR = {"model", "layers", "qat"}  # of findings on the whole


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Everything that a study, a check, an analysis and a cost report leave, and their consoles."""
    folder = tmp_path_factory.mktemp("names")
    modules = r"+search.space={qconfig: {modules: {'\[add\](1)': 'choice(qint8, qint16)'}}}"
    study = [
        "+experiment=int8_int16",
        "study=names/all",
        "search.n_trials=4",
        "search.enqueue=[]",
        "objective.max_drop=0.02",
    ]
    commands = {"tune": [*study, modules], "check": [], "cost": [], "analyze": []}
    done = {name: run_qflow(name, *TASK, *more, cwd=folder) for name, more in commands.items()}
    assert [d.returncode for d in done.values() if d.returncode > 1] == [], [d.stdout + d.stderr for d in done.values()]
    files = {str(p.relative_to(folder)): p for p in (folder / "qflow_out").rglob("*") if p.suffix in (".json", ".csv")}
    return folder, done, files


@pytest.fixture(scope="module")
def qconfig(walked):
    _, _, files = walked
    return from_dict(QConfig, json.loads(next(p for n, p in files.items() if n.endswith("qconfig.json")).read_text()))


def columns(path):
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


def test_every_name_in_every_table_is_that_of_the_qconfig(walked, qconfig):
    _, _, files = walked
    seen = {}
    for name, path in files.items():
        seen |= {text: name for text in columns(path)}
    inside = {inner for op in qconfig.ops for inner in seen if inner.startswith(f"{op}.") and "." in inner[len(op) :]}
    check = json.loads(
        next(p for n, p in files.items() if n.startswith("qflow_out/check") and n.endswith(".json")).read_text()
    )
    members = {text for row in check["rows"] for text in row["fused"].split(", ")}
    print(
        sorted(set(seen) - set(qconfig.ops)),
        {k: seen[k] for k in set(seen) - set(qconfig.ops)},
        sorted(members),
        sorted(qconfig.ops),
    )
    assert 0
