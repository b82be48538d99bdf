"""Two folders with one database and one tracking store continue one study, and one of them at a time drives it."""

import os
import shutil
import socket
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.harness import FIXED, Harness

from qflow.core.errors import TrackingError
from qflow.search.loop import driving
from qflow.search.study import Study
from qflow.tracking.lease import owned
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # a server process
BIN = next(
    (p for p in (*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/local/bin")) if (p / "initdb").exists()), None
)


@pytest.fixture
def server():
    """The URL of an empty database on a PostgreSQL server of this test."""
    if BIN is None or find_spec("psycopg") is None:
        pytest.skip("PostgreSQL (initdb) or its driver psycopg is not installed")
    user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []  # PostgreSQL refuses to run as root
    with socket.socket() as free, tempfile.TemporaryDirectory(prefix="qflow-pg-") as place:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        if user:
            shutil.chown(place, "nobody")
        quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": place, "timeout": 60}
        subprocess.run([*user, BIN / "initdb", "-D", f"{place}/data", "-A", "trust", "-U", "q", "--no-sync"], **quiet)
        control = [*user, BIN / "pg_ctl", "-D", f"{place}/data", "-w", "-l", f"{place}/log"]
        subprocess.run([*control, "-o", f"-p {port} -k {place} -c fsync=off", "start"], **quiet)
        try:
            yield f"postgresql+psycopg://q@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "fast", "stop"], **quiet)


def test_two_folders_continue_one_study_one_at_a_time(server, tmp_path):
    class There(Harness):
        def __init__(self, folder):
            super().__init__(tmp_path / "store")
            self.study = Study.open(
                server, "shared", space=self.study.space, directions=self.study.directions, locks=tmp_path / folder
            )
            self.owned = owned(MlflowTracker.open(None, self.store, "experiment"), "shared", tmp_path / folder)

    here, there, later = There("here"), There("there"), There("later")
    scratch = {"scratch": tmp_path / "scratch"}
    with driving(here.study, here.tracker, here.evaluate, owned=here.owned, **scratch) as driver:
        driver.enqueue_fixed(FIXED)
        driver.sample()
        with pytest.raises(TrackingError, match=rf"folder {tmp_path}/here, since"):
            there.run(2, owned=there.owned)
        driver.sample()
    trials = later.run(3, owned=later.owned)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert (len(later.evaluated), later.problems()) == (1, [])
