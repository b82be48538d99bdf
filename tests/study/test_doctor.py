"""The doctor names what does not agree, mends what loses no result, and leaves a study that is driven alone."""

import os
from dataclasses import replace

import pytest
from support.harness import Harness
from torch import nn

from qflow.analysis.badcases.state import write_state
from qflow.core.record import to_json
from qflow.core.temporary import PREFIX
from qflow.process.running import this_process
from qflow.quant.train.checkpoint import save_checkpoint
from qflow.study.doctor import Doctor
from qflow.study.identity import identity_tags
from qflow.tracking.artifacts import Store
from qflow.tracking.lease import LEASE, Claim, owned
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.trial.cache import write_record

pytestmark = pytest.mark.slow  # real stores on disk


def examined(root, fix=False):
    found = Doctor(Store.open(None, root), root, root, fix).findings()
    return [f.about for f in found if f.wrong], [f.about for f in found if f.mended]


def wrong(folder, storage):
    return Doctor(Store.open(None, folder), folder, storage).findings()[0].wrong


def test_what_a_killed_process_leaves_is_named_and_mended(tmp_path):
    harness = Harness(tmp_path)
    harness.run(2)
    tracker, run = harness.tracker, harness.tracker.find_study("task/stage")
    tracker.end(run, "FINISHED")
    training = tmp_path / "cache" / "training" / "task" / "a-8.safetensors"
    save_checkpoint(training, {"step": 8}, nn.Linear(1, 1))
    write_state(tmp_path / "cache" / "searches" / "a.pt", {"search": "a"}, {"step": 1})
    write_record(tmp_path / "cache" / "float" / "whole.safetensors", this_process())
    assert examined(tmp_path) == ([], [])

    committed = harness.study.trials()[0].run_id
    tracker.client.update_run(committed, status="RUNNING")
    dead = Claim("x", replace(this_process(), pid=2**22 + 1), "/gone", "2026-01-02", 60.0, ticket=1)
    tracker.client.set_tag(run, f"{LEASE}x", to_json(dead))
    (tmp_path / "cache" / "float" / "cut.safetensors").write_bytes(b"cut")
    training.write_bytes(training.read_bytes()[:-1])
    (tmp_path / "cache" / "searches" / "a.pt").write_bytes(b"cut")
    (tmp_path / "scratch" / "task%2Fstage" / "3-x").mkdir(parents=True)
    os.utime(tmp_path / "scratch" / "task%2Fstage", (0, 0))
    (tmp_path / "cache" / "float" / f"{PREFIX}killed").mkdir()
    assert examined(tmp_path) == (["studies", "runs", "leases", "cache", "checkpoints", "left over"], [])
    mended = examined(tmp_path, fix=True)[1]
    assert mended == ["runs", "cache", "checkpoints", "left over"]  # the lease went with the runs
    assert examined(tmp_path) == ([], [])
    assert tracker.client.get_run(committed).info.status == "FINISHED"
    assert harness.problems() == []


def test_a_search_and_its_runs_are_looked_for_in_both_directions(tmp_path):
    harness = Harness(tmp_path)
    harness.run(1)
    run = harness.tracker.find_study("task/stage")
    harness.tracker.log_study(run, tags=identity_tags(harness.study, tmp_path))
    harness.tracker.end(run, "FINISHED")
    assert wrong(tmp_path, tmp_path) == []
    (told,) = wrong(tmp_path, tmp_path / "elsewhere.db")
    assert told.startswith("task/stage: its runs are of this folder, and its search is not in")
    store = tmp_path / "store"
    MlflowTracker.open(None, store, "other")
    (told,) = wrong(store, tmp_path)
    assert told.startswith("task/stage: its search has 1 finished trials, whose runs are not in sqlite:///")
    parent = harness.tracker.start_trial(run, "task/stage", 7, "")
    harness.tracker.commit(parent, "{}", {}, {}, {})
    harness.tracker.end(parent, "FINISHED")
    assert wrong(tmp_path, tmp_path) == [
        f"task/stage: Trial 7 has a result in run {parent}, and the study has no such trial."
    ]


def test_a_study_that_is_driven_is_left_alone(tmp_path):
    harness = Harness(tmp_path)
    with owned(harness.tracker, "task/stage", tmp_path):
        assert examined(tmp_path, fix=True) == ([], [])


def test_results_that_wait_for_the_store_are_named_and_their_runs_left_to_the_next_start(tmp_path):
    child = os.fork()
    if child == 0:
        Harness(tmp_path).run(2, checkpoint=lambda step: os._exit(0) if step == "kept" else None)
    os.waitpid(child, 0)
    assert examined(tmp_path, fix=True) == (["spool"], [])
    harness = Harness(tmp_path)
    harness.run(2)
    harness.tracker.end(harness.tracker.find_study("task/stage"), "FINISHED")
    assert (examined(tmp_path), len(harness.evaluated)) == (([], []), 1)
