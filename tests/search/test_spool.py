"""A tracking server that goes away in the middle of a study: the study goes on, and nothing is lost or doubled."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from support.harness import Harness, outcome
from support.mlflow_server import Gate, gated_server

from qflow.core.errors import TrackingError, TrialError
from qflow.search import spool
from qflow.search.reconcile import check_invariants
from qflow.search.spool import waiting
from qflow.tracking.patience import Patience

pytestmark = pytest.mark.slow  # a server process


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with gated_server(tmp_path_factory.mktemp("server")) as gate:
        yield gate


@pytest.fixture
def gate(server):
    yield server
    server.shut()
    server.open()


@pytest.fixture
def start(gate, tmp_path, request):
    """Starts the search of this test again and again; `lines` are what its console shows."""

    def make(seconds=60.0, gate=gate):
        lines, name = [], re.sub(r"\W+", "-", request.node.name)[:80]
        harness = Harness(tmp_path, name=name, uri=gate.uri, patience=Patience(seconds, lines.append))
        place = tmp_path / "spool" / name
        return SimpleNamespace(harness=harness, lines=lines, place=place, options={"say": lines.append})

    return make


def away(gate, harness, trials):
    """An evaluation at whose so many numbers (from 0) the server goes away, and comes back one trial later."""

    def evaluate(params, folder):
        number = len(harness.evaluated)
        if number == trials[0]:
            gate.shut()
        if number == trials[1]:
            gate.open()
            harness.tracker.patience._next_look = 0.0  # a test does not wait for the next look
        return harness.evaluate(params, folder)

    return evaluate


def test_the_study_goes_on_and_its_results_are_delivered_in_order_and_once(start, gate, tmp_path):
    here = start()
    trials = here.harness.run(6, away(gate, here.harness, (1, 4)), **here.options)
    whole = Harness(tmp_path / "whole", name=here.harness.study.name).run(6)
    assert [(t.number, t.params, t.outcome) for t in trials] == [(t.number, t.params, t.outcome) for t in whole]
    assert here.harness.problems() == [] and not waiting(here.place)
    runs = here.harness.tracker.trial_runs(here.harness.study.name)
    assert sorted((n, status) for _, n, status, _ in runs) == [(n, "FINISHED") for n in range(6)]
    assert {t.number: t.run_id for t in trials} == {number: run for run, number, *_ in runs}
    file = here.harness.tracker.download(trials[2].run_id, "qconfig.json", tmp_path / "d")
    assert file.read_text() == "{}"
    assert [f"its results are kept in {here.place}" in here.lines[0], "is back after" in here.lines[1]] == [True, True]
    assert here.lines[2:] == [f"{'kept':<12} 4 trials in {here.place} are delivered"]


def test_a_failure_while_the_server_is_away_is_the_failure_of_a_run(start, gate):
    here = start()
    goes_on = away(gate, here.harness, (0, 2))

    def evaluate(params, folder):
        done = goes_on(params, folder)
        if params["int16_ratio"] == 1.0:
            raise TrialError("The dtype pair is not legal.")
        return done

    here.harness.run(2, evaluate, **here.options)
    assert [here.harness.run_status(n) for n in range(3)] == ["FINISHED", "FAILED", "FINISHED"]
    assert here.harness.problems() == []


def in_child(run):
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("step", ["kept", "committed"])
def test_a_kill_while_results_are_kept_loses_and_doubles_nothing(start, gate, step):
    """Before the server is back, and in the middle of the delivery after it."""
    before = step == "kept"

    def run():
        own = Gate(gate.behind)  # the other one is its parent's
        here = start(gate=own)
        left = [3 if before else 2]

        def checkpoint(name):
            left[0] -= name == step
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        here.harness.run(5, away(own, here.harness, (1, 99 if before else 3)), checkpoint=checkpoint, **here.options)

    assert in_child(run) == -signal.SIGKILL
    again = start()
    kept = len(waiting(again.place))
    assert kept
    trials = again.harness.run(5, **again.options)
    assert [t.number for t in trials] == list(range(5))
    assert len(again.harness.evaluated) == (2 if before else 1)
    assert check_invariants(again.harness.study, again.harness.tracker) == [] and not waiting(again.place)


@pytest.mark.proof
def test_a_server_that_is_gone_for_good_ends_the_study_in_time_and_the_next_start_completes_it(start, gate):
    here, began = start(seconds=2.0), []

    def evaluate(params, folder):
        if len(here.harness.evaluated) == 1:
            gate.shut()
            began.append(time.monotonic())
        time.sleep(0.2)
        return here.harness.evaluate(params, folder)

    with pytest.raises(TrackingError, match=f"finished trials are kept in {here.place} until then"):
        here.harness.run(500, evaluate, **here.options)
    assert time.monotonic() - began[0] < 2.0 + 3.0
    done = len(here.harness.evaluated)
    assert here.lines[-1] == f"{'kept':<12} {done - 1} trials in {here.place}, which the next start delivers"
    gate.open()
    again = start()
    assert len(again.harness.run(done + 1, **again.options)) == done + 1
    assert (len(again.harness.evaluated), again.harness.problems()) == (1, [])


def test_ctrl_c_ends_a_study_whose_server_is_away_at_once(start, gate):
    here, pressed = start(), []

    def press():
        pressed.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    def evaluate(params, folder):
        if len(here.harness.evaluated) == 2:
            gate.shut()
        if len(here.harness.evaluated) == 3:
            threading.Timer(0.1, press).start()
            time.sleep(30)
        return here.harness.evaluate(params, folder)

    with pytest.raises(KeyboardInterrupt):
        here.harness.run(5, evaluate, **here.options)
    assert time.monotonic() - pressed[0] < 2.0
    gate.open()
    again = start()
    assert len(again.harness.run(5, **again.options)) == 5
    assert (len(again.harness.evaluated), again.harness.problems()) == (2, [])


def test_a_study_that_was_taken_over_delivers_nothing_and_its_next_start_keeps_the_other_result(start, gate):
    here, taken = start(), []

    def still_owned():
        if taken:
            raise TrackingError("The owner of a study commits to it.")

    class Owned:
        def __enter__(self):
            return still_owned

        def __exit__(self, *_):
            pass

    def evaluate(params, folder):
        done = away(gate, here.harness, (1, 2))(params, folder)
        taken.extend([1] * (len(here.harness.evaluated) == 3))
        return done

    with pytest.raises(TrackingError, match="commits to it"):
        here.harness.run(5, evaluate, owned=Owned(), **here.options)
    tracker, name = here.harness.tracker, here.harness.study.name
    tracker.patience._given_up = ""
    run = tracker.find_trial(name, 1)
    tracker.commit(run, "{}", {}, {}, {})
    again = start()
    again.harness.run(4, **again.options)
    assert any(f"run {run} of trial 1 holds the result of another start; it stays in" in line for line in again.lines)
    assert tracker.result(run) == "{}"
    assert next(again.place.glob("aside-*/files/qconfig.json"))


@pytest.mark.proof
def test_a_spool_that_is_full_is_waited_for(start, gate, monkeypatch):
    monkeypatch.setattr(spool, "LIMIT", 1)
    here = start()

    def evaluate(params, folder):
        if not here.harness.evaluated:
            gate.shut()
            threading.Timer(2.0, gate.open).start()
        here.harness.evaluated.append(params)
        return outcome(params)

    assert len(here.harness.run(4, evaluate, **here.options)) == 4
    assert any("the most there may be: the study waits" in line for line in here.lines)
    assert here.harness.problems() == []
