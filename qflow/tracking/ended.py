"""A run that ends however its block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qflow.core.errors import QflowError, TrackingError
from qflow.tracking.mlflow_tracker import MlflowTracker


@contextmanager
def ended(tracker: MlflowTracker, run_id: str) -> Iterator[None]:
    """End a run with the block: FINISHED, KILLED by Ctrl-C or SIGTERM, or FAILED with the reason by another error."""
    try:
        yield
    except BaseException as error:
        reason = str(error) if isinstance(error, QflowError) else type(error).__name__
        with suppress(TrackingError):  # the first error is the one to report
            tracker.end(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason)
        raise
    tracker.end(run_id, "FINISHED")
