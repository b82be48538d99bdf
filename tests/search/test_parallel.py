"""Several trials at once: the study depends on the number of workers, not on which of them is done first."""

import random
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from support.harness import Harness, outcome
from support.workers import make

from qflow.core.errors import TrialError
from qflow.executor.pool import Pool
from qflow.executor.processes import Processes
from qflow.search.attempt import attempt
from qflow.search.loop import driving
from qflow.search.outcome import Marker

pytestmark = pytest.mark.slow  # real stores on disk


class Running:
    """A trial in a thread."""

    def __init__(self, owner, future):
        self.owner, self.future = owner, future

    def result(self):
        self.owner.now -= 1
        return self.future.result()


class Threads:
    """Evaluates trials in threads, each as long as `seconds()` says."""

    def __init__(self, workers, seconds):
        self.workers, self.seconds, self.pool = workers, seconds, ThreadPoolExecutor(workers)
        self.most = self.now = 0

    def submit(self, params, folder):
        self.now += 1
        self.most = max(self.most, self.now)
        return Running(self, self.pool.submit(attempt, self.evaluate, params, folder, 2))

    def evaluate(self, params, folder):
        time.sleep(self.seconds())
        if 0.4 < params["int16_ratio"] < 0.5:
            raise TrialError("No.")
        return outcome(params)

    def close(self):
        self.pool.shutdown()


def story(store, workers, seconds):
    harness, threads = Harness(store, sampler="tpe"), Threads(workers, seconds)
    trials = harness.run(7, executor=threads)
    assert harness.problems() == []
    assert (len(trials), threads.most) == (7, workers)
    numbers = [trial.number for trial in harness.seen]
    assert numbers == sorted(numbers)
    return [(trial.number, trial.params) for trial in harness.seen]


def test_the_same_seed_and_workers_give_the_same_study_whoever_is_done_first(store, tmp_path):
    wild = random.Random(0)
    first = story(store, 3, lambda: wild.uniform(0.0, 0.05))
    assert story(tmp_path / "again", 3, lambda: 0.0) == first


def test_an_interrupt_queues_all_running_trials_again(store):
    def stop(trial):
        if trial.number == 3:
            raise KeyboardInterrupt

    harness = Harness(store)
    with pytest.raises(KeyboardInterrupt):
        harness.run(9, executor=Threads(3, lambda: 0.0), on_trial=stop)
    assert harness.problems() == []
    waiting = [trial for trial in harness.study.trials() if trial.state == "waiting"]
    assert len(waiting) == 2
    assert not any((store / "scratch" / "task%2Fstage").iterdir())


def test_independent_points_are_measured_at_once_while_the_budget_has_room(store):
    harness, threads = Harness(store), Threads(2, lambda: 0.05)
    points = [({"int16_ratio": ratio, "method": "kl"}, f"ratio {ratio}") for ratio in (0.2, 0.7, 0.45, 0.8, 0.9)]
    with driving(harness.study, harness.tracker, harness.evaluate, scratch=store, executor=threads) as driver:
        assert driver.measure(*points[1]).number == 0
        driver.measure_all(points, room=lambda: len(driver.finished) + len(driver.running) < 3)
        assert threads.most == 2
        told = [(t.number, t.params["int16_ratio"]) for t in [*driver.trials, *driver.failed.values()]]
        assert sorted(told) == [(0, 0.7), (1, 0.2), (2, 0.45), (3, 0.8)]  # the third fails, so a further one begins
    assert harness.problems() == []


class InProcesses:
    """Evaluates trials in worker processes, each for `seconds`."""

    def __init__(self, workers, seconds):
        self.workers, self.seconds = workers, seconds
        self.pool = Pool(Processes(make, {"start": 0}), workers)

    def submit(self, params, folder):
        job = self.pool.submit({"seconds": self.seconds})
        return SimpleNamespace(result=lambda: job.result() and Marker(outcome(params), "", self.seconds))

    def close(self):
        self.pool.close()


def test_a_timeout_begins_no_further_trial_and_keeps_those_that_run(store):
    harness, ends = Harness(store), []
    executor = InProcesses(2, 0.4)
    warm = [executor.pool.submit({}) for _ in range(2)]  # the start of workers is no part of a trial's time
    assert [job.result()["sum"] for job in warm] == [0, 0]
    began = time.monotonic()
    trials = harness.run(100, executor=executor, timeout=0.6, on_trial=lambda trial: ends.append(time.monotonic()))
    assert 0.6 < ends[-1] - began < 0.6 + 0.4 + 1.0  # one trial's time, and what a slow machine adds
    assert [trial.number for trial in trials] == list(range(len(trials))) and 2 <= len(trials) <= 4
    assert harness.problems() == [] and all(trial.state == "complete" for trial in harness.study.trials())
