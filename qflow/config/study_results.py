"""What `result` holds in the JSON document of a command on a study or its trials: results.py says how it is read."""

from __future__ import annotations

from typing import Any, TypedDict


class TrialFields(TypedDict):
    """A trial of a study."""

    trial: int
    """Number of the trial in its study, from 0 on."""
    run: str
    """MLflow run id."""
    label: str
    """Name of a baseline, or what the trial is; empty for a proposal of the search."""
    qconfig: str
    """Digest of the qconfig."""
    meets: bool
    """Whether the trial meets the goal and all budgets."""
    params: dict[str, Any]
    """Searched key -> its value in this trial."""
    metrics: dict[str, float | None]
    """Metrics of the run: accuracy/* in units of the task's metric, cost/*_ms in milliseconds, shares from 0 to 1."""


class Decision(TypedDict):
    """A decision of a study."""

    stage: str
    """The stage that decided."""
    text: str
    """What was decided, and why."""


class TuneResult(TypedDict):
    """A study. After an interruption or an error it holds what is known by then."""

    study: str
    """Name of the study: promote, report and export take study=<name>."""
    experiment: str
    """MLflow experiment of the runs."""
    uri: str
    """MLflow tracking store, with passwords hidden."""
    root: str
    """Folder of stores, results and caches."""
    run: str
    """MLflow run id of the study; its trials are the runs below it."""
    goal: str
    """The goal in words."""
    met: bool
    """Whether a trial meets the goal: the exit code is 0 then, and 1 otherwise."""
    verdict: str
    """The lines that the console prints about the goal: by how much it is met or missed, and what to relax."""
    float: dict[str, float | None]
    """The float model's metric by its name; null before it is measured."""
    best: TrialFields | None
    """The best trial that meets the goal; null if none does."""
    nearest: TrialFields | None
    """If none meets the goal, the trial that misses it by least."""
    baselines: dict[str, TrialFields]
    """The trials that others are compared with, by label: all-int8, all-int16, ..."""
    raised: dict[str, list[str]]
    """Dtype -> operators of the best (or nearest) mix that are not int8, the most sensitive first."""
    trials: int
    """Number of finished trials."""
    decisions: list[Decision]
    """All decisions in order."""
    seconds: float
    """Wall time of this start in seconds."""
    written: str
    """Folder of the study: decision.md, report.html, best.json, pareto.json."""
    next: list[str]
    """Command lines that follow, quoted for a shell: promote if the goal is met."""


class ByHandResult(TrialFields):
    """A trial by hand."""

    goal: str
    """The goal in words."""
    missed: dict[str, float]
    """Constraint -> by how much it is missed; empty if the goal is met, else the exit code is 1."""
    study: str
    """Study beside whose trials it stands."""
    best: TrialFields | None
    """The best trial of that study."""
    next: list[str]
    """Command lines that follow, quoted for a shell."""


class Again(TypedDict):
    """A figure of a stored trial, and of the same trial run again."""

    stored: float | None
    """As it was stored; null if it was not."""
    again: float | None
    """As it came out now."""


class AgainResult(TypedDict):
    """A stored trial that was run again."""

    run: str
    """MLflow run id."""
    equal: bool
    """Whether all is bit for bit as it was stored; the exit code is 1 otherwise."""
    differences: list[str]
    """Each difference in words."""
    figures: dict[str, Again]
    """Metric -> its two values."""


class CompareResult(TypedDict):
    """Trials side by side."""

    equal: bool
    """Whether nothing differs; with --check the exit code is 1 otherwise."""
    comparisons: list[dict[str, Any]]
    """For each further trial: before, after, metrics with their noise, bpu (ratio of BPU times), operators, notes."""
    written: str | None
    """The page; null without out=."""


class EngineRowFields(TypedDict):
    """An operator under two engines; a difference is relative to the first, null where one has no value."""

    op: str
    """The operator."""
    dtypes: list[str]
    """output/weight of each engine."""
    output: float | None
    """Norm of the difference of the quantized outputs, over the norm of the first."""
    scale: float | None
    """Difference of the scales of the outputs."""
    weight_scale: float | None
    """Largest difference of the scales of the weights, over the channels."""


class EnginesResult(TypedDict):
    """One trial on two engines (--engine)."""

    engines: list[str]
    """Names of the engines."""
    metric_name: str
    """Name of the task's metric."""
    metrics: list[float | None]
    """The metric on each engine."""
    samples: int
    """Evaluated samples."""
    batch: int
    """Samples on which outputs were compared."""
    rows: list[EngineRowFields]
    """Operators, the largest difference of outputs first; with --check any difference makes the exit code 1."""
    notes: list[str]
    """What was not compared, and why."""


class PromoteResult(TypedDict):
    """The verdict on a trial, and the version that was registered."""

    verdict: str
    """ACCEPT, REJECT (a rule of the gate), INFEASIBLE (the goal) or ANOMALOUS (not rebuilt bit for bit)."""
    reasons: list[str]
    """Every reason against it; empty for ACCEPT, else the exit code is 1."""
    notes: list[str]
    """What is said beside the verdict."""
    run: str
    """MLflow run id of the trial."""
    model: str
    """Name of the registered model."""
    version: int | None
    """Its version; null if nothing is registered."""
    alias: str
    """Alias that points to the version."""
    source: str | None
    """What qflow.load, mlflow.pyfunc.load_model and export from= take; null if nothing is registered."""


class RollbackResult(TypedDict):
    """An alias that was moved back."""

    run: str | None
    """MLflow run id of the version; null for a dry run."""
    model: str
    """Name of the registered model."""
    version: int
    """The version that the alias points to, or would point to."""
    alias: str
    """The alias."""
    dry_run: bool
    """Whether nothing was moved."""


class CarriedResult(TypedDict):
    """A study that was bundled or imported."""

    study: str
    """Its name."""
    trials: int
    """Its trials."""
    written: str | None
    """The .zip; null for an import."""


class ReportResult(TypedDict):
    """A report of a study."""

    written: str
    """The page."""
    run: str
    """MLflow run id of the study, which holds the page too."""
    url: str
    """Its address in the MLflow UI."""
