"""Two folders with one database and one tracking store continue one study, and one of them at a time drives it."""

from pathlib import Path

import pytest
from support.harness import FIXED, Harness

from qflow.core.errors import TrackingError
from qflow.search.loop import driving
from qflow.search.study import Study
from qflow.tracking.lease import owned
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # a server process


@pytest.fixture(scope="module")
def server():
    """The URL of an empty database on a PostgreSQL server of these tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[2]))
        from benchmarks.servers import MISSING, Postgresql

        if MISSING:
            pytest.skip(MISSING)
        with Postgresql() as database:
            yield database.url("search")


def test_a_search_on_postgresql_that_is_killed_at_a_call_loses_nothing(server, tmp_path, capfd):
    from benchmarks.kill_loop import Stores
    from benchmarks.store_calls import at_each_call, kill

    assert at_each_call(tmp_path, kill, 60, Stores(storage=server)) == []
    assert "4 rounds: {'killed': 4}" in capfd.readouterr().out


def test_two_folders_continue_one_study_one_at_a_time(server, tmp_path):
    class There(Harness):
        def __init__(self, folder):
            super().__init__(tmp_path / "store")
            self.study = Study.open(
                server, "shared", space=self.study.space, directions=self.study.directions, locks=tmp_path / folder
            )
            self.owned = owned(MlflowTracker.open(None, self.store, "experiment"), "shared", tmp_path / folder)

        def open_run(self):
            return self.tracker.open_study("shared", tags={"qflow.fingerprint": "{}"}, params={}, description="")

    here, there, later = There("here"), There("there"), There("later")
    options = {"scratch": tmp_path / "scratch", "owned": here.owned, "open_run": here.open_run}
    with driving(here.study, here.tracker, here.evaluate, **options) as driver:
        driver.enqueue_fixed(FIXED)
        driver.sample()
        with pytest.raises(TrackingError, match=rf"folder {tmp_path}/here, since"):
            there.run(2, owned=there.owned)
        driver.sample()
    trials = later.run(3, owned=later.owned)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert (len(later.evaluated), later.problems()) == (1, [])
