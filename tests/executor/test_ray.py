"""Workers that Ray places: files without a shared folder, deaths, a lost node, and nothing left behind."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from support.workers import make_meeting, make_writing, running

from qflow.core.errors import ConfigError, TrialError
from qflow.executor.pool import Pool
from qflow.executor.ray_nodes import RayNodes
from qflow.executor.ray_runtime import Runtime

pytest.importorskip("ray", reason="Ray is not installed (pip install 'qflow[ray]')")
pytestmark = pytest.mark.slow  # starts Ray


def test_files_come_back_deaths_cost_their_task_alone_and_nothing_stays(tmp_path):
    kept, folder, other = tmp_path / "kept.txt", tmp_path / "trial", tmp_path / "other"
    kept.write_text("statistics")
    for made in (folder, other):
        made.mkdir()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    shared = {"start": 40, "cache": "/nowhere"}
    pool = Pool(RayNodes(make_writing, shared, Runtime(cpus=1), lambda: {"calibration/1.txt": kept}), 1, max_retries=0)
    try:
        answer = pool.submit({"add": 2, "folder": str(folder)}).result()
        assert answer["sum"] == 42
        assert json.loads((folder / "part" / "found.json").read_text()) == ["statistics"]
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
        dying = pool.submit({"kill": signal.SIGKILL, "folder": str(other)})
        with pytest.raises(TrialError, match=r"SIGKILL .*, 1 times with the retries of executor.max_retries=0"):
            dying.result()
        hanging = pool.submit({"seconds": 600, "folder": str(other)}, timeout=5.0)
        with pytest.raises(TrialError, match=r"executor.trial_timeout=5 s"):
            hanging.result()
    finally:
        before = time.monotonic()
        pool.close()
    assert time.monotonic() - before < 10  # 1.5 s on an idle machine
    place = Path(answer["cache"]).parent
    end = time.monotonic() + 20
    while (place.exists() or running(answer["process"])) and time.monotonic() < end:
        time.sleep(0.05)
    assert not place.exists() and not running(answer["process"])


def test_a_cluster_that_does_not_answer_or_has_no_room_is_named_at_once(monkeypatch):
    nodes = RayNodes(make_writing, {}, Runtime("127.0.0.1:1"))
    with pytest.raises(ConfigError, match=r"got 127.0.0.1:1: .*Connection refused. Start one \(ray start --head\)"):
        nodes.open()
    monkeypatch.setattr(Runtime, "nodes", lambda self: [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 16.0}])
    RayNodes(make_writing, {}, Runtime(), cpus=4, gpus=0.5).open()
    with pytest.raises(ConfigError, match="8 CPUs .* and 1 GPUs .* but got at most 16 CPUs and 1 GPUs a node"):
        RayNodes(make_writing, {}, Runtime(), cpus=8, gpus=1).open()


@pytest.mark.proof
def test_trials_share_a_gpu_by_their_part_of_it(tmp_path):
    """Ray is told of a GPU, which need not be there: it places by what it is told."""
    import ray

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        for gpus, at_once in ((0.5, True), (1.0, False)):
            pool = Pool(RayNodes(make_meeting, {}, Runtime(), gpus=gpus), workers=2)
            tasks = [
                {"here": here, "there": there, "seconds": 60 if at_once else 2}
                for here, there in ((one, two), (two, one))
            ]
            jobs = [pool.submit(task) for task in tasks]
            assert [job.result() for job in jobs] == [{"met": at_once, "gpus": "0"}] * 2
            pool.close()
    finally:
        ray.shutdown()


def test_a_study_on_two_nodes_ends_alike_when_one_is_lost(tmp_path):
    from benchmarks.executors import nodes

    assert os.environ.get("RAY_ADDRESS") is None
    assert nodes(tmp_path, 8) == []
