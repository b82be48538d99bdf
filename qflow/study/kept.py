"""The study's run and the trials' runs of a session, where results may wait on disk for the store (search/spool.py)."""

from __future__ import annotations

from typing import Any

from qflow.search.outcome import FinishedTrial
from qflow.search.spool import waiting
from qflow.study.front import log_front
from qflow.study.session import Session


def log_study(session: Session, **values: Any) -> None:
    """Add files and values to the study's run, now or when the store is back (MlflowTracker.log_study)."""
    assert session.driver is not None
    session.driver.spool.log_study(session.study_run, **values)


def settle(session: Session) -> None:
    """Wait until the store holds every result. Raises TrackingError if it stays away."""
    if session.driver and waiting(session.driver.spool.folder):
        session.driver.spool.deliver(wait=True)
        log_front(session.driver, session.study_run, session.standing, session.goal, session.root)  # runs have ids now


def run_of(session: Session, trial: FinishedTrial) -> str:
    """Return the run of a trial; the store is waited for while it does not hold it."""
    settle(session)
    return next((known.run_id for known in session.trials if known.number == trial.number), trial.run_id)
