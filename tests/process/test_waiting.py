"""Threads of a command wait briefly: libgomp says by itself what it was loaded with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts commands as processes of their own

LOADED = "import torch"
BRIEFLY = "from qflow.process.waiting import wait_briefly; print(wait_briefly()); import torch"
TOO_LATE = "import torch; from qflow.process.waiting import wait_briefly; print(wait_briefly())"
OURS = "GOMP_SPINCOUNT = '1000'"


def said(*command: str, cwd: Path | None = None, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE"} | environment
    done = subprocess.run([sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch's threads are not libgomp's")
    return done.stdout + done.stderr


def test_a_command_has_its_threads_sleep_soon(tmp_path: Path) -> None:
    assert OURS not in said("-c", LOADED)
    assert OURS in said("-c", BRIEFLY)
    assert OURS in said("-m", "qflow.check", "task=digits", "+task.model.epochs=0", cwd=tmp_path)


def test_the_users_own_settings_stand() -> None:
    own = said("-c", BRIEFLY, GOMP_SPINCOUNT="77")
    assert "False" in own and "GOMP_SPINCOUNT = '77'" in own
    assert "False" in said("-c", BRIEFLY, OMP_WAIT_POLICY="active")
    assert "False" in said("-c", TOO_LATE)
