"""What trials are compared by: their qconfigs, and the noise of a difference from the scores that their runs hold."""

from __future__ import annotations

from pathlib import Path

from qflow.core.qconfig import QConfig
from qflow.core.temporary import TemporaryFolder
from qflow.search.noise import BY_SEQUENCE, PAIRED, Margin, Noise, difference_noise
from qflow.search.objective import CONSTRAINT
from qflow.search.outcome import FinishedTrial
from qflow.study.kept import run_of
from qflow.study.manifest import SEQUENCES
from qflow.study.run_files import RunFiles
from qflow.study.session import Session


def paired_noise(session: Session, one: FinishedTrial, other: FinishedTrial | None = None) -> Noise:
    """Return the noise of the difference of two trials, or of a trial and the float model (None)."""
    evaluator = session.evaluator
    with TemporaryFolder() as folder:
        files = RunFiles(session.tracker, Path(folder))
        theirs = files.scores(run_of(session, other)) if other else evaluator.float_scores
        scores = files.scores(run_of(session, one)), theirs
    metric = other.outcome.metrics[session.accuracy] if other else evaluator.float_metric
    sequences = session.manifest.get(SEQUENCES, ())
    known = scores if all(scores) else None
    return difference_noise(one.outcome.metrics[session.accuracy], metric, evaluator.eval_samples, known, sequences)


def applied(session: Session, trial: FinishedTrial) -> QConfig:
    """Return the qconfig of a trial as the device runs it."""
    return session.evaluator.resolve(session.qconfig_at(trial.params))[1]


def goal_margin(session: Session, trial: FinishedTrial) -> Margin | None:
    """Return the distance of a trial from the goal with its noise; None unless its samples are paired with float's."""
    noise = paired_noise(session, trial)
    return Margin(trial.outcome.constraints[CONSTRAINT], noise) if noise.how in (PAIRED, BY_SEQUENCE) else None
