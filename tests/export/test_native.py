"""The target `qflow` comes back to the same digest, and everything else is refused in one line."""

import json

import pytest
import torch
from support.models import Attention

import qflow
from qflow.export.contract import ExportError, Subject
from qflow.export.model import export_model
from qflow.export.native import native, read_native
from qflow.tasks.identity import weights_digest


@pytest.fixture(scope="module")
def prepared():
    torch.manual_seed(0)
    rules = {"norm": "float16", "proj": "qint16@0..3", "[sub]": {"output": "qint16", "input": [None, "qint8"]}}
    made = qflow.prepare(Attention().eval(), torch.randn(4, 4, 16), qflow.ModuleNameQconfigSetter(rules))
    qflow.calibrate(made, [torch.randn(4, 4, 16)])
    return made


@pytest.fixture
def path(prepared, tmp_path):
    export_model(prepared, "qflow", tmp_path / "out")
    return tmp_path / "out" / "qflow.json"


def test_it_comes_back_to_the_same_digest(prepared, path):
    read = read_native(path)
    assert read.digest == native(Subject(prepared)).digest
    assert read.applied.digest == prepared.applied.digest
    assert read.applied == prepared.applied
    assert read.weights == weights_digest(prepared.model)
    assert read.quantizers["scales"][0]["qkv"] == [float(prepared.outputs["qkv"].scale)]


def test_another_scale_is_another_digest(prepared, path):
    kept = float(prepared.outputs["qkv"].scale)
    prepared.outputs["qkv"].set_scale(kept * 1.001)
    try:
        assert native(Subject(prepared)).digest != read_native(path).digest
    finally:
        prepared.outputs["qkv"].set_scale(kept)


def changed(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["quantizers"]["scales"][0].update(qkv=[1.0]), "content with the digest"),
        (lambda r: r.update(schema=2), "schema 2, and this qflow reads 1"),
        (lambda r: r.update(format="x"), "another format"),
        (lambda r: r.pop("march"), "keys march"),
        (lambda r: r.update(more=1), "keys more"),
        (lambda r: r["applied"].update(ops={"a": 1}), "OpQConfig"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(path, change, said):
    changed(path, change)
    with pytest.raises(ExportError, match=said) as refused:
        read_native(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000])
def test_a_foreign_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ExportError, match="Export it again"):
        read_native(tmp_path / "x.json")
