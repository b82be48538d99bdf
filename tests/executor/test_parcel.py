"""Parcels: what a worker on another machine sends, its answer with the files of a trial."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.core.errors import TrialError
from qflow.executor import parcel
from qflow.executor.parcel import packed, unpacked

names = st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}\.json)?", fullmatch=True)


@settings(max_examples=20)
@given(st.binary(max_size=50), st.dictionaries(names, st.binary(max_size=100), max_size=4))
def test_answer_and_files_arrive_as_they_were(tmp_path_factory, answer, files):
    files = {name: content for name, content in files.items() if "/" in name or f"{name}/" not in " ".join(files)}
    sent, got = tmp_path_factory.mktemp("sent"), tmp_path_factory.mktemp("got")
    for name, content in files.items():
        (sent / name).parent.mkdir(exist_ok=True)
        (sent / name).write_bytes(content)
    assert unpacked(packed(answer, sent), got) == answer
    assert {f.relative_to(got).as_posix(): f.read_bytes() for f in got.rglob("*") if f.is_file()} == files


def made(files, body=b"{}", answer=2):
    return json.dumps({"answer": answer, "files": files}).encode() + b"\n" + body


WRONG = {
    "no head": b"{}",
    "a list": b"[]\n",
    "nested": b"[" * 100_000,
    "a file outside": made({"../there": 1}, b"{}x"),
    "an absolute name": made({"/etc/there": 1}, b"{}x"),
    "a drive": made({"c:there": 1}, b"{}x"),
    "a blank part": made({"a//b": 1}, b"{}x"),
    "a line in a name": made({"a\nb": 1}, b"{}x"),
    "a deep name": made({"a/b/c/d/e": 1}, b"{}x"),
    "a size below zero": made({"a": 5, "b": -4}, b"{}x"),
    "a size that is none": made({"a": True}, b"{}x"),
    "more than it states": made({"a": 1}, b"{}xyz"),
    "less than it states": made({"a": 7}, b"{}x"),
    "too large": made({"a": 2**40}, b"{}x"),
    "too many": made({str(i): 0 for i in range(1001)}),
}


@pytest.mark.parametrize("sent", WRONG.values(), ids=WRONG)
def test_what_no_trial_sends_is_refused_before_a_file_is_written(tmp_path, sent):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(TrialError, match=r"^A worker returns at most 1000 files with plain names and 1024 MiB, but"):
        unpacked(sent, folder)
    assert [*tmp_path.rglob("*")] == [folder]


def test_a_trial_that_writes_too_much_is_refused_by_its_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(parcel, "LARGEST", 3)
    (tmp_path / "file").write_bytes(b"12")
    with pytest.raises(TrialError, match="but got 1 files, 4 bytes"):
        packed(b"{}", tmp_path)
