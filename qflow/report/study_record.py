"""What the report of a study shows, as data: read from the store, so that any study has a report at any time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qflow.analysis.measures.tables import CheckRow, Finding
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.repair.base.contract import RepairTable
from qflow.report.analysis_page import Analysis
from qflow.search.health import Searched
from qflow.search.outcome import FinishedTrial


@dataclass(frozen=True)
class Mix:
    """A trial's qconfig as the device runs it, and the predicted time of its operators in ms as (time, low, high)."""

    trial: FinishedTrial
    qconfig: QConfig
    times: Mapping[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Training:
    """Loss and learning rate of a trained trial, by step."""

    trial: FinishedTrial
    losses: Sequence[float]
    rates: Sequence[float]


@dataclass(frozen=True)
class StudyRecord:
    """A study with everything that its report shows; parts that were not recorded are None or empty."""

    name: str
    searched: Searched
    asked: Sequence[tuple[str, str]]
    """(what, the setting in words)"""
    decisions: Sequence[tuple[str, str]] = ()
    """(stage, text)"""
    verdict: str = ""
    """The lines below the final table; "" for a study that has not ended."""
    ended: bool = True
    address: str = ""
    """Address of the experiment's runs, to which a run id is added; "" without links."""
    commands: Sequence[tuple[str, str]] = ()
    """(what it does, command line)"""
    graph: ModelGraph | None = None
    mixes: Mapping[str, Mix] = field(default_factory=dict)
    """By label: that of the shown trial is `best` or `nearest`, the others are baselines."""
    analysis: Analysis = field(default_factory=Analysis)
    badcases: Path | None = None
    """Picture of the bad cases."""
    check: tuple[Sequence[CheckRow], Sequence[Finding]] | None = None
    """Rows of the model check of the shown trial, and the findings of the study's model."""
    training: Training | None = None
    repair: RepairTable | None = None
    """What the repair of the float weights tried."""

    def run_address(self, trial: FinishedTrial) -> str:
        """Address of a trial's run; "" without one that a browser may open."""
        return f"{self.address}/{trial.run_id}" if self.address.startswith(("http://", "https://")) else ""

    @property
    def shown(self) -> Mix | None:
        """The mix of the best trial, or of the nearest miss."""
        trial = self.searched.shown
        return next((m for m in self.mixes.values() if trial is not None and m.trial.number == trial.number), None)
