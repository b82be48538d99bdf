"""The doctor names what does not agree, mends what loses no result, and leaves a study that is driven alone."""

import os
from dataclasses import replace

import pytest
from support.harness import Harness

from qflow.core.record import to_json
from qflow.process.running import this_process
from qflow.study.doctor import Doctor
from qflow.tracking.artifacts import Store
from qflow.tracking.lease import LEASE, Claim, owned
from qflow.trial.cache import write_record

pytestmark = pytest.mark.slow  # real stores on disk


def examined(root, fix=False):
    found = Doctor(Store.open(None, root), root, root, fix).findings()
    return [f.about for f in found if f.wrong], [f.about for f in found if f.mended]


def test_what_a_killed_process_leaves_is_named_and_mended(tmp_path):
    harness = Harness(tmp_path)
    harness.run(2)
    tracker, run = harness.tracker, harness.tracker.find_study("task/stage")
    tracker.end(run, "FINISHED")
    (tmp_path / "cache" / "training").mkdir(parents=True)
    (tmp_path / "cache" / "training" / "a-8.safetensors").write_text("a checkpoint has another form")
    write_record(tmp_path / "cache" / "float" / "whole.safetensors", this_process())
    assert examined(tmp_path) == ([], [])

    committed = harness.study.trials()[0].run_id
    tracker.client.update_run(committed, status="RUNNING")
    dead = Claim("x", replace(this_process(), pid=2**22 + 1), "/gone", "2026-01-02", 60.0, ticket=1)
    tracker.client.set_tag(run, f"{LEASE}x", to_json(dead))
    (tmp_path / "cache" / "float" / "cut.safetensors").write_bytes(b"cut")
    (tmp_path / "scratch" / "task%2Fstage" / "3-x").mkdir(parents=True)
    os.utime(tmp_path / "scratch" / "task%2Fstage", (0, 0))
    assert examined(tmp_path) == (["studies", "runs", "leases", "cache", "left over"], [])
    assert examined(tmp_path, fix=True)[1] == ["runs", "cache", "left over"]  # the lease went with the runs
    assert examined(tmp_path) == ([], [])
    assert tracker.client.get_run(committed).info.status == "FINISHED"
    assert harness.problems() == []


def test_a_study_that_is_driven_is_left_alone(tmp_path):
    harness = Harness(tmp_path)
    with owned(harness.tracker, "task/stage", tmp_path):
        assert examined(tmp_path, fix=True) == ([], [])
