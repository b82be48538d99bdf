"""Patience with a store that goes away: what is repeated, what is said, and what ends the wait."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import ExitStack, closing, contextmanager, suppress
from subprocess import DEVNULL

import pytest
from mlflow import MlflowClient
from sqlalchemy.exc import OperationalError

from qflow.core.errors import TrackingError
from qflow.search import database
from qflow.tracking import answer, connect
from qflow.tracking.patience import Patience, Patient, is_away, leave_repeating_to_us


@pytest.fixture
def lines():
    return []


@pytest.fixture
def patience(lines):
    return Patience(20.0, lines.append)


def failing(times, error):
    """A call that fails so many times before it succeeds."""
    left = [error] * times

    def call():
        if left:
            raise left.pop()
        return "done"

    return call


def test_a_call_is_repeated_until_the_store_is_back_and_two_lines_say_it(patience, lines):
    assert patience.call("http://bob:s3cret@host", failing(3, ConnectionRefusedError("refused"))) == "done"
    assert len(lines) == 2 and "is away since 0 s (refused)" in lines[0] and "is back after" in lines[1]
    assert "s3cret" not in lines[0]


def test_a_connection_that_was_merely_old_is_no_outage(patience, lines):
    assert patience.call("", failing(1, ConnectionResetError())) == "done"
    assert not lines


def test_a_refusal_is_not_repeated(patience):
    with pytest.raises(ValueError, match="no such run"):
        patience.call("", failing(1, ValueError("no such run")))


def test_the_wait_ends_and_then_no_call_waits_any_more(lines):
    patience = Patience(0.3, lines.append)
    with pytest.raises(TrackingError, match=r"got 'gone' for 0 s from sqlite:///x. Start it and run the same command"):
        patience.call("sqlite:///x", failing(99, ConnectionError("gone")))
    start = time.monotonic()
    with pytest.raises(TrackingError, match="must answer"):
        patience.call("sqlite:///x", lambda: pytest.fail("the store was given up"))
    assert time.monotonic() - start < 0.1


def test_what_an_interrupted_command_still_writes_does_not_wait(patience):
    start = time.monotonic()
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(TrackingError, match="must answer"):
            patience.call("", failing(99, ConnectionError("gone")))
    assert time.monotonic() - start < 1


def test_ctrl_c_ends_the_wait_and_what_follows_it(patience):
    timer = threading.Timer(0.5, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        patience.call("", failing(99, ConnectionError("gone")))
    with pytest.raises(TrackingError, match="an interrupted call"):
        patience.call("", lambda: "done")


@pytest.mark.parametrize(
    ("text", "away"),
    [("database is locked", True), ("database or disk is full", False), ("no such table: runs", False)],
)
def test_of_a_database_file_only_the_lock_of_another_process_passes(text, away):
    assert is_away(OperationalError("", {}, sqlite3.OperationalError(text))) is away


def test_a_run_whose_creation_lost_its_answer_is_not_created_twice(tracker, patience):
    client, lost = tracker.client._target, [True]

    class Losing:
        search_runs = staticmethod(client.search_runs)

        def create_run(self, *args, **terms):
            run = client.create_run(*args, **terms)
            if lost:
                lost.clear()
                raise ConnectionResetError("the answer is lost")
            return run

    run = Patient(Losing(), "", patience).create_run(tracker.experiment_id, run_name="0", tags={"qflow.trial": "0"})
    assert [found.info.run_id for found in tracker._search("")] == [run.info.run_id]


@pytest.fixture
def silent():
    """The port of a server that takes connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_a_server_that_never_answers_is_said_and_given_up_in_time(silent, lines, monkeypatch):
    monkeypatch.setattr(answer, "SLOW", 0.5)
    leave_repeating_to_us()
    uri, start = f"http://127.0.0.1:{silent}", time.monotonic()
    with pytest.raises(TrackingError, match="timed out"):
        Patient(MlflowClient(tracking_uri=uri), uri, Patience(1.0, lines.append)).get_run("1")
    assert time.monotonic() - start < 3.0
    assert len(lines) == 1 and "(no answer yet); waiting up to 1 s for it" in lines[0]


def test_a_database_that_never_answers_is_refused_at_the_start(silent, tmp_path, monkeypatch):
    pytest.importorskip("psycopg")
    monkeypatch.setattr(connect, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(database, "ANSWER_SECONDS", 0.3)
    uri = f"postgresql+psycopg://q@127.0.0.1:{silent}/x"
    with pytest.raises(TrackingError, match="The tracking store must answer within 0 s, but got no answer from post"):
        connect.open_store(uri, tmp_path)
    with pytest.raises(TrackingError, match="The database of a search must answer within 0 s"):
        database.open_study(uri, "one", ["minimize"])


@contextmanager
def server(store, uri):
    """An MLflow server on the store of this test; it is killed at the end of the block."""
    database = f"sqlite:///{store}/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--workers", "1"]
    command += ["--artifacts-destination", str(store / "files"), "--port", uri.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)
    try:
        for _ in range(300):
            with suppress(OSError):
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            time.sleep(0.3)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_server_is_waited_for_and_one_that_is_killed_is_given_up(store, lines):
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        uri = f"http://127.0.0.1:{found.getsockname()[1]}"
    leave_repeating_to_us()
    patience, box = Patience(120, lines.append), ExitStack()
    client = Patient(MlflowClient(tracking_uri=uri), uri, patience)
    starting = threading.Thread(target=box.enter_context, args=[server(store, uri)])
    with box:
        starting.start()
        run = client.create_run("0", run_name="0").info.run_id
        assert [" is away since " in lines[0], " is back after " in lines[1], len(lines)] == [True, True, 2]
        assert [found.info.run_id for found in client.search_runs(["0"])] == [run]
        starting.join()
    patience.seconds = 0.5
    with pytest.raises(TrackingError, match="Connection refused"):
        client.get_run(run)
