"""The loop on a real store: order, continuation, failures, and kills at every step."""
# Long: every kind of failure and kill is tested on one harness.

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
from support.harness import SPACE, Harness, outcome

from qflow.core.errors import BrokenMixError, TrackingError, TrialError
from qflow.core.stored_text import LINE, REASON
from qflow.process.interrupts import interrupts
from qflow.search.domain import Choice, Range
from qflow.search.driver import FAILURES
from qflow.search.loop import driving
from qflow.search.outcome import MARKER_LIMIT, FailedTrial, Marker
from qflow.search.reconcile import MAX_RETRY
from qflow.study.budget import halted

pytestmark = pytest.mark.slow  # real stores on disk

STEPS = ("asked", "started", "linked", "evaluated", "kept", "uploaded", "committed", "ended", "constrained", "told")


@pytest.fixture
def harness(store) -> Harness:
    return Harness(store)


def test_fixed_trials_come_first_and_everything_reaches_the_tracker(harness):
    trials = harness.run(4)
    assert [t.label for t in trials] == ["all-int8", "all-int16", "", ""]
    assert [t.number for t in trials] == [0, 1, 2, 3]
    assert harness.seen == trials
    assert harness.problems() == []
    first = trials[1]
    assert first.outcome == outcome(first.params)
    assert harness.tracker.run_metrics(first.run_id)["cost/latency_ms"] == 2.0
    assert harness.tracker.run_params(first.run_id)["int16_ratio"] == "1.0"
    tags = harness.tracker.run_tags(first.run_id)
    assert (tags["qflow.label"], tags["qflow.trial"]) == ("all-int16", "1")
    assert harness.tracker.download(first.run_id, "qconfig.json", harness.store / "d").read_text() == "{}"
    assert not any((harness.store / "scratch" / "task%2Fstage").iterdir())


def test_running_again_continues_and_repeats_nothing(store):
    first = Harness(store)
    before = first.run(3)
    second = Harness(store)
    after = second.run(6)
    assert after[:3] == before
    assert len(second.evaluated) == 3
    assert second.seen == after[3:]
    assert Harness(store).run(6) == after
    assert Harness(store).run(2) == after
    keys = [tuple(sorted(t.params.items())) for t in after]
    assert len(set(keys)) == 6
    assert second.problems() == []


def test_the_same_fixed_label_is_evaluated_once(harness):
    harness.run(2, fixed=[("all-int8", {"int16_ratio": 0.0}), ("all-int8", {"int16_ratio": 0.1})])
    harness.run(3, fixed=[("all-int8", {"int16_ratio": 0.3})])
    assert sum(t.label == "all-int8" for t in harness.run(3)) == 1
    assert len(harness.evaluated) == 3


def test_the_same_point_is_evaluated_once_and_a_small_space_ends(store):
    harness = Harness(store, {"method": Choice(("kl", "mse")), "bits": Range(4, 16, 4)})
    evaluated = []

    def evaluate(params, _folder):
        evaluated.append(tuple(sorted(params.items())))
        return outcome({"int16_ratio": len(evaluated) / 10})

    fixed = [("a", {"method": "kl", "bits": 8}), ("b", {"method": "kl", "bits": 8})]
    trials = harness.run(50, evaluate, fixed=fixed)
    assert len(trials) == len(set(evaluated)) == len(evaluated) == 6
    assert [t.label for t in trials if t.label] == ["a"]
    assert harness.problems() == []
    assert len(harness.run(50, evaluate, fixed=fixed)) == 6
    assert len(evaluated) == 6


def test_a_failing_trial_has_failed_and_the_study_goes_on(harness):
    def evaluate(params, folder):
        if params["int16_ratio"] == 0.0:
            raise TrialError("The dtype pair is not legal.")
        return harness.evaluate(params, folder)

    trials = harness.run(3, evaluate)
    assert [t.label for t in trials] == ["all-int16", "", ""]
    failed = harness.seen[0]
    assert isinstance(failed, FailedTrial)
    assert (failed.label, failed.reason) == ("all-int8", "The dtype pair is not legal.")
    assert harness.tracker.run_tags(failed.run_id)["qflow.end_reason"] == failed.reason
    assert harness.run_status(0) == "FAILED"
    assert harness.problems() == []
    harness.run(4)  # mended: the fixed trial gets another try
    assert [t.label for t in harness.run(4)] == ["all-int16", "", "", "all-int8"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"objectives": (math.nan, 1.0)}, "finite"),
        ({"objectives": (math.inf, 1.0)}, "finite"),
        ({"objectives": (None, 1.0)}, "finite"),
        ({"objectives": (0.5,)}, "2 objectives, but got 1"),
        ({"constraints": {"drop": math.nan}}, "constraint is a number"),
        ({"metrics": {"accuracy/drop": math.nan}}, "NaN"),
        ({"tags": {"long": "x" * MARKER_LIMIT}}, "characters of JSON"),
    ],
)
def test_what_is_absent_or_not_a_number_never_wins(harness, changes, reason):
    trials = harness.run(1, lambda params, _: outcome(params, **(changes if params["int16_ratio"] == 0 else {})))
    assert [t.label for t in trials] == ["all-int16"]
    assert reason in harness.seen[0].reason
    assert harness.run_status(0) == "FAILED"
    assert harness.problems() == []


def test_infinite_constraints_and_metrics_survive_the_marker():
    before = Marker(outcome({"int16_ratio": 0.5}, constraints={"c": math.inf}, metrics={"sqnr": math.inf}), "x", 1.5)
    assert Marker.from_json(before.to_json()) == before


def test_failures_in_a_row_end_the_search(harness):
    def evaluate(_params, _folder):
        raise TrialError("No data.")

    with pytest.raises(TrialError, match=f"{FAILURES} failures in a row, the last: No data"):
        harness.run(20, evaluate)
    assert len(harness.seen) == FAILURES
    assert harness.problems() == []


def test_any_exception_of_the_users_code_fails_its_trial_alone_and_names_the_place(harness):
    def evaluate(params, folder):
        if params["int16_ratio"] == 0.0:
            raise MemoryError("no room\nfor it")
        if params["int16_ratio"] == 1.0:
            math.sqrt(-1)
        return harness.evaluate(params, folder)

    assert len(harness.run(2, evaluate)) == 2
    reasons = [trial.reason for trial in harness.seen[:2]]
    assert re.fullmatch(rf"MemoryError: no room for it \({__file__}:\d+\)", reasons[0])
    assert reasons[1].startswith("ValueError:") and __file__ in reasons[1]
    assert harness.run_status(0) == "FAILED"
    assert harness.problems() == []


class Own(BaseException):
    """As a library of the user's may have it."""


@pytest.mark.parametrize("error", [SystemExit(5), GeneratorExit("closed"), Own("x\x1b[31m\x00" + "y" * 10_000)])
def test_what_would_end_the_process_fails_its_trial_alone_with_reason_and_place(harness, error):
    def evaluate(params, folder):
        if params["int16_ratio"] == 0.0:
            raise error
        return harness.evaluate(params, folder)

    assert len(harness.run(1, evaluate)) == 1
    reason = harness.seen[0].reason
    assert reason.startswith(f"{type(error).__name__}: ") and __file__ in reason
    assert reason.isprintable() and len(reason) <= LINE
    assert harness.problems() == []


def test_mixes_that_cannot_work_one_after_another_end_the_proposals_and_the_reason_is_said(harness):
    def evaluate(_params, _folder):
        raise BrokenMixError("Its outputs are NaN.")

    with driving(harness.study, harness.tracker, evaluate, scratch=harness.store / "scratch") as driver:
        assert halted(driver) == ""
        for _ in range(FAILURES):
            driver.sample()
        assert driver.sample() is None
        assert halted(driver).startswith("ended early by 10 mixes in a row that failed, the last: Its outputs are NaN.")


def test_a_foreign_exception_in_every_trial_ends_the_search(harness):
    def evaluate(_params, _folder):
        raise KeyError("label")

    with pytest.raises(TrialError, match=f"{FAILURES} failures in a row, the last: KeyError: 'label' .*test_loop.py"):
        harness.run(20, evaluate)
    assert harness.problems() == []


def test_a_message_that_no_database_takes_fails_its_trial_and_blocks_no_start(store):
    texts = ["a lone \ud800, a \x00" + "x" * 1_000_000]

    def evaluate(params, folder):
        if texts:
            raise RuntimeError(texts.pop())
        return outcome(params)

    assert len(Harness(store).run(1, evaluate)) == 1
    harness = Harness(store)
    assert len(harness.run(2)) == 2
    failed = next(trial for trial in harness.study.trials() if trial.ending == "failed")
    assert failed.reason.startswith(r"RuntimeError: a lone \ud800, a \x00xxx") and len(failed.reason) <= REASON
    assert harness.tracker.run_tags(failed.run_id)["qflow.end_reason"] == failed.reason
    assert harness.problems() == []


def test_a_store_that_breaks_in_the_commit_loses_no_result(harness, monkeypatch):
    def broken(*_args, **_options):
        raise TrackingError("The server is gone.")

    with monkeypatch.context() as patch:
        patch.setattr(harness.tracker, "commit", broken)
        with pytest.raises(TrackingError, match="gone"):
            harness.run(2)
    assert [t.label for t in harness.run(2)] == ["all-int8", "all-int16"]
    assert len(harness.evaluated) == 2
    assert harness.problems() == []


def test_timeout_stops_before_the_next_trial(harness):
    def evaluate(params, folder):
        time.sleep(0.05)
        return harness.evaluate(params, folder)

    assert len(harness.run(100, evaluate, timeout=0.01)) == 1
    assert harness.problems() == []


def test_an_interrupted_trial_is_put_back(harness):
    def evaluate(params, folder):
        if len(harness.evaluated) == 1 and not harness.study.trials()[-1].attempt:
            raise KeyboardInterrupt
        return harness.evaluate(params, folder)

    for _ in range(MAX_RETRY + 2):  # an interrupt is nobody's fault and uses up no try
        with pytest.raises(KeyboardInterrupt):
            harness.run(3, evaluate)
        assert harness.problems() == []
    assert harness.run_status(1) == "KILLED"
    assert [t.label for t in harness.run(3)] == ["all-int8", "all-int16", ""]


def test_an_interrupt_after_the_commit_keeps_the_trial(harness):
    def stop(step: str) -> None:
        if step == "committed":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.run(1, checkpoint=stop)
    assert harness.problems() == []
    harness.run(1)
    assert len(harness.evaluated) == 1


def test_sigterm_ends_cleanly(harness):
    before = signal.getsignal(signal.SIGTERM)

    def evaluate(_params, _folder):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        harness.run(3, evaluate)
    assert signal.getsignal(signal.SIGTERM) == before
    assert harness.run_status(0) == "KILLED"
    assert "stopped" in harness.study.trials()[0].reason
    assert harness.problems() == []
    with interrupts() as asked:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert asked.is_set()


def test_a_sigterm_that_python_drops_is_obeyed_before_the_next_trial(harness):
    def evaluate(params, folder):
        with contextlib.suppress(KeyboardInterrupt):  # as in a finalizer
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return harness.evaluate(params, folder)

    with pytest.raises(KeyboardInterrupt):
        harness.run(3, evaluate)
    assert len(harness.evaluated) == 1
    assert harness.problems() == []


def test_a_second_driver_is_refused(harness):
    def evaluate(params, folder):
        with pytest.raises(TrackingError, match=f"process {os.getpid()} does"):
            Harness(harness.store).run(1)
        return harness.evaluate(params, folder)

    assert len(harness.run(1, evaluate)) == 1


def run_and_die(store: Path, step: str = "", trial: int = 0, evaluate=None, **options) -> int:
    """Run the loop in a child that kills itself after `step` of its n-th trial; the signal it died of."""
    child = os.fork()
    if child == 0:
        try:
            left = [trial]

            def checkpoint(name: str) -> None:
                left[0] -= name == step
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            Harness(store, **options).run(4, evaluate, checkpoint=checkpoint)
        finally:
            os._exit(1)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.proof), "nsga2"])
def test_a_search_that_was_killed_makes_the_proposals_of_one_that_was_not(store, tmp_path, sampler):
    for step, trial in (("asked", 2), ("committed", 1)):
        assert run_and_die(store, step, trial, sampler=sampler) == signal.SIGKILL
    continued = Harness(store, sampler=sampler).run(7)
    whole = Harness(tmp_path / "whole", sampler=sampler).run(7)
    assert [trial.params for trial in continued] == [trial.params for trial in whole]


def test_a_start_that_is_refused_changes_nothing(store):
    first, second = Harness(store), Harness(store)
    with driving(first.study, first.tracker, first.evaluate, scratch=store / "scratch") as driver:
        driver.sample()
        run = first.tracker.find_study("task/stage")
        before = first.tracker.client.get_run(run).to_dictionary(), first.study.trials()
        opened = []
        options = {"scratch": store / "scratch", "open_run": lambda: opened.append("opened")}
        with (
            pytest.raises(TrackingError, match="One process at a time"),
            driving(second.study, second.tracker, second.evaluate, **options),
        ):
            pass
        assert (first.tracker.client.get_run(run).to_dictionary(), first.study.trials()) == before
        assert not opened
        assert driver.sample().number == 1


def test_a_start_with_the_store_of_another_study_loses_no_result(store, tmp_path):
    """The trial was committed and not told; in the other store its run does not exist."""
    assert run_and_die(store, "committed") == signal.SIGKILL
    wrong = Harness(store)
    wrong.tracker = Harness(tmp_path / "other").tracker
    with pytest.raises(TrackingError, match="must exist there"):
        wrong.run(2)
    right = Harness(store)
    assert [trial.label for trial in right.run(1)] == ["all-int8"]
    assert right.evaluated == []


@pytest.mark.parametrize("step", STEPS)
def test_kill_at_every_step_loses_nothing(store, step):
    assert run_and_die(store, step, trial=1) == signal.SIGKILL
    harness = Harness(store)
    trials = harness.run(4)
    assert harness.problems() == []
    assert [t.label for t in sorted(trials, key=lambda t: t.label)][2:] == ["all-int16", "all-int8"]
    assert len(trials) == 4
    done_before = 2 if STEPS.index(step) >= STEPS.index("kept") else 1
    assert len(harness.evaluated) == 4 - done_before  # nothing is computed twice that was committed
    assert not any((store / "scratch" / "task%2Fstage").iterdir())


def test_kills_in_a_row_with_a_kill_in_the_recovery(store):
    for step in ("linked", "committed", "asked", "told"):
        assert run_and_die(store, step, trial=0) == signal.SIGKILL
    harness = Harness(store)
    assert len(harness.run(4)) == 4
    assert harness.problems() == []


def test_a_point_that_kills_its_process_is_given_up(store):
    def evaluate(params, _folder):
        if params["int16_ratio"] == 0.0:
            os.kill(os.getpid(), signal.SIGKILL)
        return outcome(params)

    for _ in range(MAX_RETRY + 1):
        assert run_and_die(store, evaluate=evaluate) == signal.SIGKILL
    harness = Harness(store)
    assert all(t.label != "all-int8" for t in harness.run(4))
    assert all(params["int16_ratio"] != 0.0 for params in harness.evaluated)
    assert harness.problems() == []


def test_the_check_sees_what_is_wrong(store):
    assert run_and_die(store, "told", trial=0) == signal.SIGKILL
    assert run_and_die(store, "linked", trial=1) == signal.SIGKILL
    harness = Harness(store)
    text = " ".join(harness.problems())
    assert "is RUNNING" in text
    assert "Trial 2 is running" in text


def test_a_point_is_measured_once_whoever_asks(store):
    first, second = Harness(store), Harness(store)
    options = {"scratch": store / "scratch", "on_trial": first.seen.append}
    with driving(first.study, first.tracker, first.evaluate, **options) as driver:
        trial = driver.measure({"int16_ratio": 0.25, "method": "kl"}, "a quarter")
        assert driver.measure({"method": "kl", "int16_ratio": 0.25}) == trial
        assert driver.sample().number == 1
    assert (trial.label, len(first.evaluated)) == ("a quarter", 2)
    with driving(second.study, second.tracker, second.evaluate, scratch=store / "scratch") as driver:
        assert driver.measure({"int16_ratio": 0.25, "method": "kl"}) == trial
        assert driver.trials[0] == trial
    assert second.evaluated == []
    assert second.problems() == []


def test_a_ctrl_c_that_python_drops_is_obeyed_before_the_next_trial(harness):
    def evaluate(params, folder):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return harness.evaluate(params, folder)

    with pytest.raises(KeyboardInterrupt):
        harness.run(3, evaluate)
    assert len(harness.evaluated) == 1
    assert harness.problems() == []


def test_a_point_that_leaves_a_key_open_is_not_measured(harness):
    """The sampler would fill it anew each time, and it would never be the point that was asked for."""
    with driving(harness.study, harness.tracker, harness.evaluate, scratch=harness.store / "scratch") as driver:
        with pytest.raises(ValueError, match=r"lacks \['method'\]"):
            driver.measure({"int16_ratio": 0.5})
        assert harness.study.trials() == []


def test_a_space_ends_when_every_point_beside_what_is_kept_was_tried(store):
    """A continuum that is kept at one value does not hide that the rest can be listed."""
    harness = Harness(store, {**SPACE, "steps": Range(1, 4)})
    with driving(harness.study, harness.tracker, harness.evaluate, scratch=store / "scratch") as driver:
        while driver.sample({"int16_ratio": 0.25}):
            pass
        assert len(driver.trials) == 6
        assert {t.params["int16_ratio"] for t in driver.trials} == {0.25}


def test_a_failure_that_another_try_would_repeat_stands(store):
    """Training that diverges does so again; what failed otherwise is tried again at the next start."""

    class Diverged(TrialError):
        lasting = True

    def evaluate(params, _folder):
        tried.append(params["method"])
        raise (Diverged if params["method"] == "kl" else TrialError)("No.")

    for expected in (["kl", "mse"], ["mse"]):
        harness, tried = Harness(store), []
        with driving(harness.study, harness.tracker, evaluate, scratch=store / "scratch") as driver:
            for method in ("kl", "mse"):
                assert isinstance(driver.measure({"int16_ratio": 0.5, "method": method}), FailedTrial)
        assert tried == expected


def test_what_is_screened_is_not_evaluated_and_what_is_left_of_a_small_space_is(store):
    harness = Harness(store, {"method": Choice(("kl", "mse")), "int16_ratio": Range(0.0, 0.9, 0.1)})
    with driving(harness.study, harness.tracker, harness.evaluate, scratch=store / "scratch") as driver:
        while driver.sample(screen=lambda params: "too dear" if params["int16_ratio"] > 0.45 else ""):
            pass
    assert len(harness.evaluated) == 10
    assert max(params["int16_ratio"] for params in harness.evaluated) == 0.4
    ends = {trial.reason for trial in harness.study.trials() if trial.ending == "screened"}
    assert ends == {"too dear"}
    assert harness.problems() == []


def test_a_sampler_that_proposes_what_is_screened_gets_to_learn_where_it_is(harness):
    """Nearly all of the space costs too much: no more than ten in a row are left out, and the search goes on."""
    with driving(harness.study, harness.tracker, harness.evaluate, scratch=harness.store / "scratch") as driver:
        for _ in range(12):
            assert driver.sample(screen=lambda params: "too dear" if params["int16_ratio"] > 0.01 else "")
    assert len(harness.evaluated) == 12


def test_an_owner_that_was_overtaken_says_so_when_another_start_has_ended_its_trial(harness, store):
    taken = []

    def still_owned():
        if taken:
            raise TrackingError("The owner of a study commits to it.")

    def checkpoint(step):
        if step == "ended":
            Harness(store).study.fail(0, "lost", "its process gave no sign of life")
            taken.append(True)

    with pytest.raises(TrackingError, match="commits to it"):
        harness.run(1, owned=contextlib.nullcontext(still_owned), checkpoint=checkpoint)
