"""Whatever a file holds, a reader gives a result or a QflowError in one line, and nothing else."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qflow.bundle.bounded import read_config, read_json, read_yaml_text
from qflow.config.device_file import load_cost, load_rules
from qflow.core.errors import QflowError
from qflow.cost_model.networks import read_networks
from qflow.cost_model.profile import read_profile
from qflow.study.comparison import side_of_json

WORDS = st.sampled_from(
    ["march", "rules", "cost", "defaults", "nash-m", "_self_", "oe_version", "clock_ghz", "int8_inputs", "summary"]
    + ["details", "layer details", "model info", "performance", "latency (ms)", "perf_result", "perf_json_data"]
    + ["applied", "ops", "output", "qint8", "task", "seed", "study", "${x}", "???", "", "é", "1e999", ".nan", "-1"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=20,
)
TABLES = st.lists(st.lists(WORDS | st.sampled_from(["model", "dtype", "n_gemm_ops"]), max_size=9), max_size=4)
CONTENTS = (
    st.binary(max_size=200)
    | VALUES.map(lambda value: json.dumps(value).encode())
    | TABLES.map(lambda rows: "\n".join(",".join(row) for row in rows).encode())
    | st.text("[]{}:,-&*!|>#'\"\n ab1.$", max_size=60).map(str.encode)
)
READERS = {
    "device.yaml": [load_rules, load_cost],
    "profile.json": [read_profile],
    "networks.csv": [read_networks],
    "qconfig.json": [side_of_json],
    "config.yaml": [lambda path: read_config(path.parent), lambda path: read_yaml_text(path.parent, path.name)],
    "record.json": [lambda path: read_json(path.parent, path.name)],
}


@pytest.mark.parametrize("name", READERS)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=CONTENTS)
def test_a_reader_gives_a_result_or_one_line(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    for read in READERS[name]:
        assert "\n" not in refusal(read, path)


def refusal(read, path):
    """What the reader says of the file if it refuses it; "" if it reads it. Other exceptions are let through."""
    try:
        read(path)
    except QflowError as error:
        return str(error)
    return ""
