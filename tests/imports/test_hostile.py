"""Files that are not what they seem: each is refused in one line, nothing of them runs, and no memory goes."""

import io
import pickle
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qflow
from qflow.core.errors import ConfigError
from qflow.imports.read import read_content

CHECK = "Each layer out qconfig:\nModule Name  out dtype\n-----------  ---------\nstem         qint8\n"
GOOD = {
    "qconfig.json": '{"march": "nash-m", "ops": {"stem": {"output": "qint8"}}}',
    "quant.json": '{"node_config": {"/stem/Conv": {"input0": "int16", "input1": "int8"}}}',
    "check.txt": CHECK,
    "module.py": "OPERATORS = {'stem': dict(output=qint16, scale=0.5, weight=qint8, inputs={0: (qint8, 0.1)})}\n",
    "names.csv": "qflow,plugin,derived,sure\nstem,stem,path,yes\n",
    "nodes.csv": "qflow,nodes,tensor,dtype\nstem,/stem/Conv,x,qint8\n",
}


class Runs:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(path, value):
    torch.save(value, path)
    return path


def repacked(path, **parts):
    """The archive of torch.save with other content of some parts."""
    kept = {}
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            kept[part.filename] = archive.read(part)
    with zipfile.ZipFile(path, "w", parts.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, data in kept.items():
            archive.writestr(name, parts.get(name.rpartition("/")[2].removesuffix(".pkl"), data))


def refused(path):
    with pytest.raises(ConfigError) as error:
        read_content(path)
    text = str(error.value)
    assert "\n" not in text and len(text) < 400 and path.name in text
    return text


def outcome(path):
    """The kind of a file, or why it is refused."""
    try:
        return read_content(path).kind
    except ConfigError as error:
        return str(error)


def test_a_pt_file_that_would_run_something_is_refused_before_it_is_read(tmp_path):
    ran = tmp_path / "ran"
    for value in (Runs(open, str(ran), "w"), [Runs(eval, "1")], {"a": Runs(bytearray, 1 << 40)}):
        text = refused(saved(tmp_path / "x.pt", value))
        assert "Save it with builtin types" in text
    assert not ran.exists()


def test_pt_files_that_are_no_archives_or_grow_are_refused(tmp_path):
    place = tmp_path / "x.pt"
    place.write_bytes(pickle.dumps({"stem": "qint8"}))
    assert "no archive of torch.save" in refused(place)
    saved(place, {"stem": "qint8"})
    repacked(place, compression=zipfile.ZIP_DEFLATED)
    assert "compressed parts" in refused(place)
    saved(place, {"stem": "qint8"})
    repacked(place, data=b"\x80\x02" + b"]" * 100)
    refused(place)
    for value in (3, [], {"a": 1.5}, {1: "qint8"}, {"stem": {"dtyp": "qint8"}}, {"a": torch.ones(2)}, [[1, 2]]):
        if not isinstance(value, dict) or "a" not in value or hasattr(value["a"], "numel"):
            refused(saved(place, value))


BAD = {
    "list.json": "[1]", "deep.json": "[" * 100_000, "nan.json": '{"model_config": {"all_node_type": NaN}}',
    "other.json": '{"node_config": {}, "extra": 1}', "level.json": '{"node_config": []}',
    "node.json": '{"node_config": {"/a/Conv": "int8"}}', "default.json": '{"model_config": {"all_node_type": "int4"}}',
    "none.txt": "nothing", "empty.txt": "Each layer out qconfig:\n", "binary.txt": b"\xff\x00", "call.py": "import os",
    "code.py": "OPERATORS = {'a': dict(output=__import__('os'))}", "deep.py": "OPERATORS = " + "[" * 5000,
    "type.py": "OPERATORS = {'a': dict(output='qint8', inputs={99999: (qint8, 1)})}", "null.py": "\0",
    "other.csv": "a,b\n1,2\n", "short.csv": "qflow,plugin,derived,sure\nstem\n", "empty.csv": "", "x.yaml": "a: 1",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_text_files_that_are_something_else(name, tmp_path):
    content = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path / name)


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_text_is_read_or_refused_but_never_fails_otherwise(name, tmp_path, data):
    text = GOOD[name]
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, min(len(text), at + 6)))
    put = data.draw(st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(list('{}[]",|:-0/')))
    (tmp_path / name).write_text(text[:at] + put + text[end:], encoding="utf-8")
    assert "\n" not in outcome(tmp_path / name)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_archive_is_read_or_refused_but_never_fails_otherwise(tmp_path, data):
    file = io.BytesIO()
    torch.save({"stem": {"output": "qint8", "weight": torch.float16}}, file)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.pt").write_bytes(content)
    assert "\n" not in outcome(tmp_path / "x.pt")


def test_names_of_a_file_are_printed_in_one_line_and_long_ones_take_no_time(tmp_path):
    prepared = qflow.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(), torch.randn(2, 4))
    saved(tmp_path / "x.pt", {"0": "qint16", "a\n\x1b[2J": "qint8", "." * 1_000_000: "qint8"})
    (first, text), *_ = qflow.read_mix(tmp_path / "x.pt", prepared).lines()
    assert (first, text[:10]) == ("not in the model", "a??[2J, ..") and len(text) < 400
    (tmp_path / "x.json").write_text("/*" * 1_000_000)
    refused(tmp_path / "x.json")


def test_a_sensitivity_table_is_named_as_such_where_a_mix_is_read(tmp_path):
    saved(tmp_path / "t.pt", [["stem", "activation", "Conv2d", 1.0]])
    assert "qflow.read_sensitivity" in refused(tmp_path / "t.pt")
    sample = torch.randn(2, 4)
    prepared = qflow.prepare(torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(), sample)
    for row in (["0", "activation", "Linear"], ["0", "both", "Linear", 1.0], ["0", "weight", "Linear", "much"]):
        torch.save([row], tmp_path / "t.pt")
        with pytest.raises(ConfigError, match="A sensitivity table is a list of rows"):
            qflow.read_sensitivity(tmp_path / "t.pt", prepared)
