"""The result of a trial, and the interface of the tracker that the loop uses.

The JSON of a `Marker` is written to the trial's run in one batch with its params and metrics. This is the commit point:
a trial is finished exactly if its run has a marker. All later steps can be repeated from the marker.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qflow.core import record
from qflow.core.errors import QflowError, TrialError
from qflow.search.domain import Scalar

MARKER_LIMIT = 60_000  # characters that the text columns of every database hold
STOPPED = "qflow.stopped"  # tag of a trial that ended early: its metric is the worst possible one


@dataclass(frozen=True)
class Outcome:
    """The result of one evaluated trial: the values for the search, and the params and metrics of its MLflow run."""

    objectives: tuple[float, ...]  # in the study's order, e.g. (metric, latency_ms)
    constraints: Mapping[str, float]  # <= 0 is feasible
    params: Mapping[str, Scalar]  # MLflow params
    metrics: Mapping[str, float]  # MLflow metrics, named with slashes: accuracy/drop, cost/latency_ms
    tags: Mapping[str, str] = field(default_factory=dict)

    def check(self, n_objectives: int) -> None:
        """Raise TrialError unless all objectives are present and finite and no constraint is NaN."""
        if len(self.objectives) != n_objectives:
            raise TrialError(
                f"A trial gives {n_objectives} objectives, but got {len(self.objectives)}. Return all of them."
            )
        if not all(_finite(value) for value in self.objectives):
            raise TrialError(
                f"Objectives are finite numbers, but got {self.objectives}. Raise TrialError for a trial that fails."
            )
        for name, value in self.constraints.items():
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise TrialError(
                    f"A constraint is a number, but got {value!r} for {name}. Raise TrialError for a trial that fails."
                )


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@dataclass(frozen=True)
class Marker:
    """The content of the commit marker; `seconds` is the wall time of the evaluation."""

    outcome: Outcome
    label: str = ""
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return canonical JSON. Raises TrialError if a value has no JSON form or the text is too long to be stored."""
        try:
            text = record.to_json(self)
        except QflowError as error:
            raise TrialError(str(error)) from None
        if len(text) >= MARKER_LIMIT:
            raise TrialError(
                f"An outcome takes fewer than {MARKER_LIMIT} characters of JSON, but got {len(text)}. "
                f"Write long tables and texts to files in the trial's folder."
            )
        return text

    @classmethod
    def from_json(cls, text: str) -> Marker:
        """Build the marker from the text that `to_json` returned. Raises TrialError for another one."""
        try:
            return record.from_dict(cls, json.loads(text))
        except (QflowError, ValueError, TypeError, AttributeError, RecursionError) as error:
            words = " ".join(str(error).split())[:120]
            raise TrialError(f"The result of a run is one that qflow wrote, but got: {words}. Take another.") from error


@dataclass(frozen=True)
class FinishedTrial:
    """A committed trial; `params` is the proposed point, `label` names a fixed trial."""

    number: int
    run_id: str
    params: Mapping[str, Scalar]
    label: str
    outcome: Outcome
    seconds: float

    @property
    def stopped(self) -> str:
        """After how many samples the evaluation ended early, in words: its metric is then the worst possible one."""
        return self.outcome.tags.get(STOPPED, "")


@dataclass(frozen=True)
class FailedTrial:
    """A trial that could not be evaluated, with the reason; it is never the best.

    If it is `lasting`, the point itself is the cause (TrialError.lasting), and another try would fail too.
    """

    number: int
    run_id: str
    params: Mapping[str, Scalar]
    label: str
    reason: str
    lasting: bool = False


class Tracker(Protocol):
    """The tracker methods that the loop calls; run statuses are RUNNING, FINISHED, FAILED, KILLED."""

    def open_study(self, name: str, *, tags: Mapping[str, str], params: Mapping[str, Scalar], description: str) -> str:
        """Return the run id of the study; its run is created if it does not exist."""

    def find_study(self, name: str) -> str | None:
        """Return the run id of the study, or None if it has no run."""

    def start_trial(self, study_run_id: str, study: str, number: int, label: str) -> str:
        """Create a trial run and return its id."""

    def upload(self, run_id: str, folder: Path) -> list[str]:
        """Upload the trial's files; return the names of those that are tables."""

    def commit(
        self,
        run_id: str,
        outcome_json: str,
        params: Mapping[str, Scalar],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        folder: Path | None,
        tables: Sequence[str],
    ) -> None:
        """Write values and marker; the marker becomes visible only when everything else is."""

    def result(self, run_id: str) -> str | None:
        """Return the marker of a run, or None if it was not committed."""

    def find_trial(self, study: str, number: int) -> str | None:
        """Return the id of the newest run of a trial."""

    def running_trials(self, study: str) -> list[str]:
        """Return the ids of the trial runs that were not ended."""

    def trial_runs(self, study: str) -> list[tuple[str, int, str, str | None]]:
        """Return (run id, trial number, status, marker) of every trial run. It is slow and meant for checks."""

    def run_tags(self, run_id: str) -> dict[str, str]:
        """Return the tags of a run."""

    def end(self, run_id: str, status: str, reason: str | None = None) -> None:
        """End a run."""

    def log_study(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float],
        params: Mapping[str, Scalar],
        tags: Mapping[str, str],
        folder: Path | None,
        tables: Sequence[str],
    ) -> None:
        """Add files and values to the run of a study; the same a second time changes nothing."""

    def keeping(self, place: Path) -> AbstractContextManager[None]:
        """Inside, calls to a store that is away raise a StoreAwayError at once; what they hold is kept in `place`."""
