"""A study has one owner, whatever folders and hosts share its store, and a dead owner holds it up for no longer than
its lease."""

import threading
import time
from dataclasses import replace

import pytest

from qflow.core.errors import TrackingError
from qflow.core.record import to_json
from qflow.process.running import Process, this_process
from qflow.tracking.lease import LEASE, Claim, claims_of, owned
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # real stores on disk

STUDY = "net/stage"
DEAD = replace(this_process(), pid=2**22 + 1)  # above the kernel's largest process id
AWAY = Process("other", "another boot", 7, "1")


@pytest.fixture
def tracker(tmp_path):
    return MlflowTracker.open(None, tmp_path / "store", "experiment")


def tags(tracker):
    return tracker.run_tags(tracker.find_study(STUDY))


def left_by(tracker, process, seconds=60.0, ticket=1):
    """Leave the claim of another process on the study's run."""
    run = tracker.find_study(STUDY) or tracker.create_study(STUDY)
    tracker.client.set_tag(run, "qflow.fingerprint", "{}")
    claim = Claim("stranger", process, "/elsewhere", "2026-01-02 03:04:05 +0000", seconds, ticket=ticket)
    tracker.client.set_tag(run, f"{LEASE}stranger", to_json(claim))
    return run, claim


def test_a_second_start_is_told_who_drives_the_study_where_and_since_when_and_changes_nothing(tracker, tmp_path):
    left_by(tracker, this_process())
    before = tags(tracker)
    with (
        pytest.raises(TrackingError, match=r"host \S+, folder /elsewhere, since 2026-01-02 03:04:05 \+0000"),
        owned(tracker, STUDY, tmp_path),
    ):
        pass
    assert tags(tracker) == before


def test_after_the_end_nothing_is_left_and_a_run_that_was_never_opened_is_gone(tracker, tmp_path):
    with owned(tracker, STUDY, tmp_path) as still_owned:
        still_owned()
        assert [claim.folder for claim in claims_of(tags(tracker))] == [str(tmp_path)]
        tracker.open_study(STUDY, tags={"qflow.fingerprint": "{}"}, params={}, description="")
    assert not any(key.startswith(LEASE) for key in tags(tracker))
    with pytest.raises(RuntimeError), owned(tracker, "refused", tmp_path):
        raise RuntimeError
    assert tracker.find_study("refused") is None


@pytest.mark.parametrize("ticket", [0, 1])
def test_a_dead_owner_of_this_host_holds_nothing_up(tracker, tmp_path, ticket):
    left_by(tracker, DEAD, ticket=ticket)
    start = time.monotonic()
    with owned(tracker, STUDY, tmp_path) as still_owned:
        still_owned()
    assert time.monotonic() - start < 5


def test_a_silent_owner_of_another_host_is_waited_for_and_its_late_heartbeat_does_not_bring_it_back(tracker, tmp_path):
    run, claim = left_by(tracker, AWAY, seconds=0.5)
    said = []
    with owned(tracker, STUDY, tmp_path, say=said.append) as still_owned:
        tracker.client.set_tag(run, f"{LEASE}stranger", to_json(replace(claim, beat=5)))
        still_owned()
        assert [claim.folder for claim in claims_of(tags(tracker))] == [str(tmp_path)]
    assert len(said) == 1
    assert "host other, folder /elsewhere" in said[0]


def test_an_owner_of_another_host_that_shows_a_heartbeat_keeps_the_study(tracker, tmp_path):
    run, claim = left_by(tracker, AWAY)
    beats = threading.Timer(0.5, tracker.client.set_tag, (run, f"{LEASE}stranger", to_json(replace(claim, beat=1))))
    beats.start()
    with pytest.raises(TrackingError, match="host other"), owned(tracker, STUDY, tmp_path):
        pass


def test_an_owner_that_was_overtaken_is_told_before_it_commits(tracker, tmp_path):
    with owned(tracker, STUDY, tmp_path) as still_owned:
        claim = claims_of(tags(tracker))[0]
        tracker.client.set_tag(tracker.find_study(STUDY), f"qflow.revoked.{claim.owner}", "another")
        with pytest.raises(TrackingError, match="another one for net/stage while this process gave no sign of life"):
            still_owned()


def test_a_run_that_another_start_has_taken_over_is_not_deleted_by_the_one_that_made_it(tracker, tmp_path):
    with owned(tracker, STUDY, tmp_path):  # its network is cut before it opens the study
        run, claim = tracker.find_study(STUDY), claims_of(tags(tracker))[0]
        tracker.client.set_tag(run, f"qflow.revoked.{claim.owner}", "another")
        tracker.client.set_tag(run, f"{LEASE}another", to_json(replace(claim, owner="another")))
    assert [claim.owner for claim in claims_of(tags(tracker))] == ["another"]


def test_of_many_starts_at_the_same_moment_at_most_one_owns_the_study(tracker, tmp_path):
    tracker.create_study(STUDY)
    inside, most, refused = [], [], []
    line = threading.Barrier(6)

    def start(number):
        line.wait()
        try:
            with owned(tracker, STUDY, tmp_path / str(number)):
                inside.append(number)
                most.append(len(inside))
                time.sleep(0.2)
                inside.remove(number)
        except TrackingError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) + len(refused) == 6
