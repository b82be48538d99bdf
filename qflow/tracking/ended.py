"""A run that ends however its block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from qflow.core.errors import QflowError
from qflow.tracking.mlflow_tracker import MlflowTracker


@contextmanager
def ended(tracker: MlflowTracker, run_id: str) -> Iterator[None]:
    """End a run with the block: FINISHED, KILLED by Ctrl-C or SIGTERM, or FAILED with the reason by another error."""
    try:
        yield
    except BaseException as error:
        reason = str(error) if isinstance(error, QflowError) else type(error).__name__
        tracker.end(run_id, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", reason)
        raise
    tracker.end(run_id, "FINISHED")
