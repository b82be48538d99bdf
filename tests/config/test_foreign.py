"""Exceptions of the system and of stores end a command in one line and code 2; other ones are defects with code 3."""

import errno
import json
import os
import resource
import signal
import sqlite3

import pytest
from support.compose import BASE, ended

from qflow.config.command import run_command
from qflow.config.foreign import AGAIN, CLOSED, FULL, OTHER_KIND, foreign_line
from qflow.core.store import write_whole
from qflow.core.stored_text import LINE


def wrapped(inner, outer):
    """`outer` as it is raised while `inner` is handled."""
    outer.__context__ = inner
    return outer


def of_sqlalchemy(text):
    from sqlalchemy.exc import OperationalError

    return OperationalError("INSERT ...", {}, sqlite3.OperationalError(text))


def of_mlflow(text):
    from mlflow.exceptions import MlflowException

    return MlflowException(text)


def of_optuna(text):
    from optuna.exceptions import StorageInternalError

    return StorageInternalError(text)


ENDS = {
    "a full disk": (
        lambda: OSError(errno.ENOSPC, "No space left on device", "/x/best.json"),
        f"Results need room on the disk, but got 'No space left on device for /x/best.json'. Free some, and {AGAIN}.",
    ),
    "a full disk in SQLite": (
        lambda: of_sqlalchemy("database or disk is full"),
        "Results need room on the disk, but got '(sqlite3.OperationalError) database or disk is full'. Free some, and "
        f"{AGAIN}.",
    ),
    "a full disk in MLflow": (
        lambda: wrapped(OSError(errno.ENOSPC, "No space left on device"), of_mlflow("API request failed")),
        f"Results need room on the disk, but got 'API request failed'. Free some, and {AGAIN}.",
    ),
    "a closed folder": (
        lambda: PermissionError(errno.EACCES, "Permission denied", "/x"),
        "Folders of a command are open to it, but got 'Permission denied for /x'. Open it, or name another.",
    ),
    "a folder in place of a file": (
        lambda: IsADirectoryError(errno.EISDIR, "Is a directory", "/x"),
        "A path of a command is a file or a folder as it says, but got 'Is a directory for /x'. Name another.",
    ),
    "a driver": (
        lambda: ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2"),
        "A store is reached through its driver, but got none called psycopg2. Install it: pip install psycopg2.",
    ),
    "a table of MLflow": (
        lambda: of_mlflow("no such table: runs\nand more"),
        f"A call to a store must succeed, but got 'no such table: runs'. Repair the store, and {AGAIN}.",
    ),
    "a storage of Optuna": (
        lambda: of_optuna("gone"),
        f"A call to a store must succeed, but got 'gone'. Repair the store, and {AGAIN}.",
    ),
    "no memory": (
        MemoryError,
        f"A command needs memory, but got none left. Lower task.batch_size or sensitivity.memory_mb, and {AGAIN}.",
    ),
    "bytes that are no text": (
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        "Text is in UTF-8, but got ''utf-8' codec can't decode byte 0xff in position 0: invalid start byte'. "
        "QFLOW_DEBUG=1 shows which file.",
    ),
    "values without an end": (
        lambda: RecursionError("maximum recursion depth exceeded"),
        "Values are nested a few levels deep, but got 'maximum recursion depth exceeded'. QFLOW_DEBUG=1 shows where.",
    ),
}


@pytest.mark.parametrize("kind", ENDS)
def test_an_exception_from_outside_is_one_line_and_code_2(kind, capsys):
    made, line = ENDS[kind]

    def act(config):
        raise made()

    code, error = ended(capsys, "tune", act, BASE)
    assert (code, error) == (2, f"qflow: {line}\n")


def test_what_is_no_error_from_outside_stays_a_defect_with_its_traceback(capsys):
    def act(config):
        return {}["absent"]

    code, error = ended(capsys, "tune", act, BASE)
    assert code == 3 and "Traceback" in error and "KeyError" in error
    assert not foreign_line(FileNotFoundError(errno.ENOENT, "No such file or directory"))


def test_every_code_of_the_system_has_one_meaning():
    every = [*FULL, *CLOSED, *OTHER_KIND]
    assert len(every) == len(set(every))
    assert all(foreign_line(OSError(code, os.strerror(code))).count("\n") == 0 for code in every)


def test_a_file_that_does_not_fit_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    place = tmp_path / "best.json"
    write_whole(place, '{"trial": 1}')
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as full:
            write_whole(place, "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert foreign_line(full.value).startswith("Results need room on the disk, but got 'File too large'.")
    assert json.loads(place.read_text()) == {"trial": 1} and list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("bye"), GeneratorExit("x\x1b[2J" + "y" * 10_000)])
def test_what_the_users_code_raises_to_end_the_process_is_a_mistake_with_its_place(error, capsys):
    def act(_config):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command("tune", act, [BASE])
    line = capsys.readouterr().err.removesuffix("\n")
    assert ended.value.code == 2
    assert line.isprintable() and len(line) <= LINE + 10
    assert f"but got {type(error).__name__}: " in line and f"({__file__}:" in line
