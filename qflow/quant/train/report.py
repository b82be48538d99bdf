"""The result of a training, and the error of one that has diverged."""

from __future__ import annotations

from dataclasses import dataclass

from qflow.core.errors import TrialError


@dataclass(frozen=True)
class TrainingReport:
    """Result of a training: losses and learning rates (of the first parameter group) by step, seconds of this call."""

    steps: int
    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    seconds: float
    finished: bool
    reason: str = ""
    """Why it ended before its last step; empty if it finished."""
    findings: tuple[str, ...] = ()


class DivergedError(TrialError):
    """The loss or a gradient is not finite, or the loss has become too large; the trial has failed."""

    lasting = True

    def __init__(self, message: str, step: int, first_bad_operator: str, report: TrainingReport) -> None:
        super().__init__(message)
        self.step = step
        self.first_bad_operator = first_bad_operator
        """The first bad operator, or the first parameter with a bad gradient; "" if all are finite and in range."""
        self.report = report
