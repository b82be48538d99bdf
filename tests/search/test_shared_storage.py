"""A search in a database on a server: who drives it, what it belongs to, and what happens when the server is away."""

import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from support.harness import FIXED, Harness

from qflow.core.errors import TrackingError
from qflow.search.loop import driving
from qflow.search.study import Study
from qflow.tracking import answer
from qflow.tracking.lease import owned
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.patience import Patience

pytestmark = pytest.mark.slow  # a server process


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL server of these tests, with a database for searches and one for runs."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[2]))
        from benchmarks.servers import MISSING, Postgresql

        if MISSING:
            pytest.skip(MISSING)
        with Postgresql() as database:
            yield database


def test_a_search_on_postgresql_that_is_killed_at_a_call_loses_nothing(server, tmp_path, capfd):
    from benchmarks.kill_loop import Stores
    from benchmarks.store_calls import at_each_call, kill

    assert at_each_call(tmp_path, kill, 60, Stores(storage=server.url("search"))) == []
    assert "2 rounds: {'killed': 2}" in capfd.readouterr().out


class There(Harness):
    """A start in a folder of its own, with the search on the server and the runs in `store`."""

    def __init__(self, server, name, store, folder, uri=None):
        self.lines = []
        super().__init__(store, name=name, uri=uri, patience=Patience(60.0, self.lines.append))
        self.study = Study.open(
            server.url("search"), name, space=self.study.space, directions=self.study.directions, locks=folder,
            patient=partial(self.tracker.patience.call, server.url("search")),
        )  # fmt: skip
        self.options = {
            "owned": owned(MlflowTracker.open(uri, store, "experiment"), name, folder),
            "open_run": self.opened,
            "scratch": folder / "scratch",
            "say": self.lines.append,
        }

    def opened(self):
        tags = {"qflow.fingerprint": "{}"}  # a run without it is deleted again
        return self.tracker.open_study(self.study.name, tags=tags, params={}, description="")


def test_two_folders_continue_one_study_one_at_a_time(server, tmp_path):
    here, there, later = (There(server, "one", tmp_path / "store", tmp_path / folder) for folder in "abc")
    with driving(here.study, here.tracker, here.evaluate, **here.options) as driver:
        driver.enqueue_fixed(FIXED)
        driver.sample()
        with pytest.raises(TrackingError, match=rf"folder {tmp_path}/a, since"):
            there.run(2, **there.options)
        driver.sample()
    trials = later.run(3, **later.options)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert (len(later.evaluated), later.problems()) == (1, [])


def test_a_second_tracking_store_for_one_search_is_refused_at_the_start(server, tmp_path):
    here, there = (There(server, "two", tmp_path / store, tmp_path / store) for store in "ab")
    with driving(here.study, here.tracker, here.evaluate, **here.options):
        with pytest.raises(TrackingError, match="has one tracking store, but got a second one for two"):
            there.run(1, **there.options)
        assert there.study.trials() == []


def test_runs_in_a_database_that_drops_its_connections_are_written_later_and_the_study_goes_on(server, tmp_path):
    lines = []
    here = Harness(tmp_path, name="three", uri=server.url("mlflow"), patience=Patience(60.0, lines.append))

    def evaluate(params, folder):
        number = len(here.evaluated)
        if number == 1:
            server.kill()
        if number == 3:
            server.start()
            here.tracker.patience._next_look = 0.0
        return here.evaluate(params, folder)

    trials = here.run(5, evaluate, say=lines.append)
    whole = Harness(tmp_path / "whole", name="three").run(5)
    assert [(t.number, t.params, t.outcome) for t in trials] == [(t.number, t.params, t.outcome) for t in whole]
    assert here.problems() == [] and len(here.evaluated) == 5
    assert "its results are kept in" in lines[0] and "is back after" in lines[1]
    assert lines[2:] == [f"{'kept':<12} 3 trials in {tmp_path / 'spool' / 'three'} are delivered"]


def test_a_search_in_the_database_that_is_away_waits_and_says_why(server, tmp_path):
    here = There(server, "four", tmp_path, tmp_path, uri=server.url("mlflow"))
    here.tracker.patience.why = "other folders may continue it"
    lost = iter(range(1, 4))

    def evaluate(params, folder):
        if next(lost, None) == 2:
            server.kill()
            threading.Timer(1.0, server.start).start()
        return here.evaluate(params, folder)

    assert [trial.number for trial in here.run(4, evaluate, **here.options)] == [0, 1, 2, 3]
    assert here.problems() == [] and len(here.evaluated) == 4
    assert "waiting up to 60 s for it, because other folders may continue it" in here.lines[0]
    assert ["is back after" in line for line in here.lines[1:]] == [True]


def test_a_database_that_hangs_is_said_and_given_up_in_time_and_ctrl_c_ends_the_wait(server, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "SLOW", 0.5)
    here = There(server, "five", tmp_path, tmp_path)
    patience = here.tracker.patience
    with server.hanging():
        threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            here.study.trials()
        assert time.monotonic() - start < 2.0
        patience._given_up, patience.seconds = "", 1.5
        with pytest.raises(TrackingError, match=r"got 'no answer' for \d s"):
            here.study.trials()
        assert time.monotonic() - start < 5.0
    assert ["is away since" in line and "(no answer yet)" in line for line in here.lines] == [True]
    assert [trial.number for trial in There(server, "five", tmp_path, tmp_path).run(2)] == [0, 1]
