"""Temporary folders: one that a killed process has left is removed by the next, one that is in use is not."""

import os
import signal
from pathlib import Path

from qflow.core import temporary
from qflow.core.store import write_whole
from qflow.core.temporary import TemporaryFolder, left_over


def of_a_killed_process(place):
    """A folder of a process that was killed while it wrote there."""
    if not (child := os.fork()):
        folder = TemporaryFolder(place)
        (Path(folder.name) / "half").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = place.iterdir()
    return left


def test_what_a_killed_process_has_left_is_removed_by_the_next_that_writes_there(tmp_path):
    left = of_a_killed_process(tmp_path)
    assert list(left_over(tmp_path)) == [left]
    temporary._tidy.cache_clear()  # of this process, which is the next one
    write_whole(tmp_path / "file", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_in_use_and_one_of_another_kind_stay(tmp_path):
    (tmp_path / temporary.PREFIX).symlink_to("/")
    with TemporaryFolder(tmp_path) as folder:
        if not (child := os.fork()):
            os._exit(len(list(left_over(tmp_path))))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert Path(folder).is_dir()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_was_taken_for_left_over_is_made_again(tmp_path, monkeypatch):
    taken = []

    def open_late(path, flags, opened=os.open, **options):
        if not taken:
            taken.append(os.rmdir(path))
        return opened(path, flags, **options)

    monkeypatch.setattr(temporary.os, "open", open_late)
    with TemporaryFolder(tmp_path) as folder:
        assert taken and Path(folder).is_dir()


class Owner:
    """What a folder goes with."""


def test_a_folder_goes_with_its_owner_but_not_with_a_copy_of_it_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    owner = Owner()
    folder = temporary.folder_of(owner)
    if not (child := os.fork()):
        del owner
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.is_dir() and list(left_over(tmp_path)) == []
    del owner
    assert not folder.exists()
