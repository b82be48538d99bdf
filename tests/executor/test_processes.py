"""Worker processes: answers, deaths, hangs, and no process left behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.workers import make, running

from qflow.core.errors import TrialError
from qflow.executor.pool import Pool
from qflow.executor.processes import Processes

pytestmark = pytest.mark.slow  # starts interpreters


@pytest.fixture
def processes():
    made = Pool(Processes(make, {"start": 40}), workers=2)
    yield made
    made.close()


def test_a_death_and_a_hang_cost_their_task_alone(processes, tmp_path):
    fine = processes.submit({"add": 2, "seconds": 0.5})
    retried = processes.submit({"add": 3, "kill": signal.SIGKILL, "once": str(tmp_path / "once")})
    dying, exiting = processes.submit({"kill": signal.SIGSEGV}), processes.submit({"exit": 3})
    hanging, after = processes.submit({"seconds": 60}, timeout=2.0), processes.submit({"add": 1})
    assert [fine.result()["sum"], retried.result()["sum"], retried.deaths] == [42, 43, 1]
    with pytest.raises(TrialError, match=r"SIGSEGV, 2 times with the retries of executor.max_retries=1"):
        dying.result()
    with pytest.raises(TrialError, match="exit code 3"):
        exiting.result()
    with pytest.raises(TrialError, match=r"executor.trial_timeout=2 s"):
        hanging.result()
    answer = after.result()
    assert answer["sum"] == 41
    processes.close()
    assert not running(answer["process"])


def test_workers_end_with_a_driver_that_is_killed(tmp_path):
    code = (
        "from support.workers import make\n"
        "from qflow.executor.pool import Pool\n"
        "from qflow.executor.processes import Processes\n"
        "p = Pool(Processes(make, {'start': 0}), workers=1)\n"
        "print(p.submit({}).result()['process'], flush=True)\n"
        "p.submit({'seconds': 60}).result()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env) as driver:
        worker = int(driver.stdout.readline())
        assert running(worker)
        driver.kill()
    end = time.monotonic() + 10
    while running(worker) and time.monotonic() < end:
        time.sleep(0.02)
    assert not running(worker)
