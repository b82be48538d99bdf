"""What `result` holds in the JSON document of each command (`--json`): its fields, with units and meaning.

A new command adds the class of its result to RESULTS; one with several forms has a class for each. The JSON schema of a
document (`qflow describe <command> --result`) is made from these classes and their docstrings, and tests hold what
commands write to it. Paths are absolute unless a field says otherwise. Metrics have the names that they have on the
MLflow run, with their unit as the end of the name.
"""

from __future__ import annotations

from typing import Any, TypedDict

from qflow.config.study_results import (
    AgainResult,
    ByHandResult,
    CarriedResult,
    CompareResult,
    EnginesResult,
    PromoteResult,
    ReportResult,
    RollbackResult,
    TuneResult,
)


class Finding(TypedDict):
    """A remark of the model check."""

    op: str
    """The operator."""
    level: str
    """check or error."""
    message: str
    """What was found."""


class CheckResult(TypedDict):
    """The check of a model."""

    qconfig: str
    """Digest of the qconfig as the device runs it."""
    march: str
    """The march whose rules were applied."""
    operators: int
    """Operators of the model."""
    rows: int
    """Operators in the qconfig."""
    not_as_requested: int
    """Operators that the device lowers."""
    findings: list[Finding]
    """Findings above the level info; one of the level error makes the exit code 1."""
    written: str
    """Folder of model_check_result.txt and model_check.json."""


class CostResult(TypedDict):
    """The predicted cost of a qconfig."""

    qconfig: str
    """Digest of the qconfig as the device runs it."""
    metrics: dict[str, float | None]
    """cost/*: latency and its interval in ms, traffic in MB (10^6 bytes), and more."""
    refusal: str
    """Why the prediction is outside of what was validated, so that the exit code is 1; empty if it is inside."""
    int16_costs_ms: dict[str, float]
    """Operator -> milliseconds that int16 would add for it alone."""
    run: str
    """MLflow run id."""
    written: str
    """Folder of cost.csv, cost.json, cost.png and more."""


class FitResult(TypedDict):
    """The fit of a cost model."""

    rows: int
    """Measured times that were used."""
    families: list[str]
    """Families of networks that they are of."""
    errors: dict[str, str]
    """What was left out -> errors on it, in words."""
    written: str | None
    """The device file; null without out=."""


class SensitivityFields(TypedDict):
    """A quantizer alone."""

    op_name: str
    """The operator."""
    op_type: str
    """Its type."""
    sensitive_type: str
    """activation or weight."""
    quant_dtype: str
    """qint8, qint16 or float16."""
    score: float | None
    """How far the outputs move from float; larger is more sensitive."""
    spread: float | None
    """Standard deviation of the score over the bad cases."""
    exact: bool
    """True if it was measured, false if it was estimated."""
    flops: int
    """Two for each multiply-accumulate of a sample."""
    outputs: list[Any]
    """[output, the plugin's raw metric of it] for each output; empty for an estimate."""


class Fidelity(TypedDict):
    """The outputs' distance to float before and after the advice is followed."""

    before: float | None
    """Before."""
    after: float | None
    """After."""
    line: str
    """The overrides that follow all advice together."""


class AnalyzeResult(TypedDict, total=False):
    """What the stages of an analysis found; fields of stages that did not run are missing, empty or null."""

    analysed: str
    """The qconfig in words."""
    metric: str | None
    """Metric by which samples are compared."""
    worst_samples: list[int]
    """Indices of the calibration samples on which the outputs differ most from float."""
    sensitivity: list[SensitivityFields]
    """Rows, the most sensitive first."""
    advice: list[dict[str, Any]]
    """For each operator that stands out: op, cause, gain, text, and line, the override that follows the advice."""
    fidelity: Fidelity | None
    """Whether the advice helps."""
    qat_debug: dict[str, Any]
    """Stages of the QAT check with metric, reference and passed, and the verdict; a stage at fault is exit code 1."""
    run: str
    """MLflow run id."""
    written: str
    """Folder of analysis.html, tables and pictures."""


class ExportResult(TypedDict):
    """The targets of an export."""

    study: str
    """Study of the trial; empty if it is of none."""
    run: str
    """MLflow run id of the trial."""
    folder: str
    """Folder with a folder for each target."""
    targets: dict[str, Any]
    """Target -> its files (relative to its folder), fallbacks, unexpressed parts of the qconfig, and notes."""


class Examined(TypedDict):
    """One invariant."""

    ok: bool
    """Whether it holds, after what --fix has mended."""
    told: str
    """What was looked at."""
    wrong: list[str]
    """Each thing that is wrong; any makes the exit code 1."""
    mended: list[str]
    """Each thing that was mended."""


class DoctorResult(TypedDict):
    """The state of the stores."""

    findings: dict[str, Examined]
    """What was looked at -> what was found."""
    fix: bool
    """Whether --fix was given."""


class PluginCheck(TypedDict):
    """One thing that engine=plugin relies on."""

    what: str
    """The thing."""
    expected: str
    """What the contract has."""
    got: str
    """What the installed plugin has."""
    ok: bool
    """Whether they agree; the exit code is 1 otherwise."""


class PluginResult(TypedDict):
    """The check of an installed plugin (doctor plugin)."""

    plugin: str
    """Version of horizon_plugin_pytorch."""
    checks: list[PluginCheck]
    """All checks."""


class InitResult(TypedDict):
    """A task of the user's own that was written."""

    kind: str
    """Kind of the task."""
    written: list[str]
    """Files, relative to the working folder."""
    next: str
    """The command line that tunes the task."""


class DescribeResult(TypedDict):
    """The description that was asked for."""

    described: dict[str, Any]
    """A JSON schema (draft 2020-12), or the table of all commands."""


class TrainResult(TypedDict):
    """A float training."""

    written: str
    """File of the weights."""


RESULTS: dict[str, tuple[type, ...]] = {
    "init": (InitResult,),
    "tune": (TuneResult,),
    "check": (CheckResult,),
    "cost": (CostResult, FitResult),
    "analyze": (AnalyzeResult,),
    "trial": (ByHandResult, AgainResult),
    "compare": (CompareResult, EnginesResult),
    "promote": (PromoteResult, RollbackResult),
    "export": (ExportResult, CarriedResult),
    "report": (ReportResult,),
    "doctor": (DoctorResult, PluginResult),
    "describe": (DescribeResult,),
    "train_float": (TrainResult,),
}
"""Command -> the classes of its result, one for each form of the command."""
