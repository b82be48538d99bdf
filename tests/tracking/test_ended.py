"""The end of a run."""

from contextlib import nullcontext

import pytest

from qflow.core.errors import TrackingError
from qflow.tracking.ended import ended


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", None),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (TrackingError("It is full."), "FAILED", "It is full."),
    ],
)
def test_a_run_ends_however_its_block_ends(tracker, error, status, reason):
    run = tracker.open_study("s", tags={}, params={}, description="")
    with nullcontext() if error is None else pytest.raises(type(error)), ended(tracker, run):
        if error is not None:
            raise error
    assert tracker.client.get_run(run).info.status == status
    assert tracker.run_tags(run).get("qflow.end_reason") == reason
