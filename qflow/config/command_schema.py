"""The schema of each command, composed from the groups of schema.py."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from qflow.config.executor_schema import ExecutorSchema
from qflow.config.promote_schema import GateSchema, PromoteGoalSchema
from qflow.config.repair_schema import RepairSchema
from qflow.config.schema import (
    CalibrationSchema,
    DeviceSchema,
    MetricSchema,
    ObjectiveSchema,
    QatSchema,
    QConfigSchema,
    QuantSchema,
    SecuritySchema,
    SensitivitySchema,
    TaskSchema,
)
from qflow.config.search_schema import SearchSchema
from qflow.config.tracking_schema import PromoteTrackingSchema, ReportTrackingSchema, StoreSchema, TrackingSchema
from qflow.core.limits import LARGEST_SEED, Above, Between, OneOf

STAGES = ("badcase", "layers", "sensitivity", "advice", "qat_debug")


@dataclass(kw_only=True)
class TuneSchema:
    """`python -m qflow.tune`."""

    workflow: str = MISSING
    """The file in workflows/ that runs the stages; +experiment=<name> sets it."""
    study: str = "${task.name}/${workflow}"
    """Name of the study; a study with an existing name continues."""
    seed: Annotated[int, Between(0, LARGEST_SEED)] = 0
    """Seed of every random choice: the same configuration and seed give the same numbers."""
    root: str = MISSING
    """Folder of the stores, results and caches; QFLOW_HOME sets it too."""
    engine: Annotated[str, OneOf(("qflow", "plugin"))] = "qflow"
    """Who prepares, calibrates and evaluates trials: qflow, or plugin (an installed horizon_plugin_pytorch)."""
    task: TaskSchema = field(default_factory=TaskSchema)
    metric: MetricSchema = field(default_factory=MetricSchema)
    device: DeviceSchema = field(default_factory=DeviceSchema)
    calibration: CalibrationSchema = field(default_factory=CalibrationSchema)
    quant: QuantSchema = field(default_factory=QuantSchema)
    repair: RepairSchema = field(default_factory=RepairSchema)
    qconfig: QConfigSchema = field(default_factory=QConfigSchema)
    sensitivity: SensitivitySchema = field(default_factory=SensitivitySchema)
    qat: QatSchema = field(default_factory=QatSchema)
    search: SearchSchema = field(default_factory=SearchSchema)
    objective: ObjectiveSchema = field(default_factory=ObjectiveSchema)
    tracking: TrackingSchema = field(default_factory=TrackingSchema)
    executor: ExecutorSchema = field(default_factory=ExecutorSchema)


@dataclass(kw_only=True)
class CheckSchema(TuneSchema):
    """`python -m qflow.check`: has the keys of a study, and uses those of the model, its qconfig and calibration."""


@dataclass(kw_only=True)
class AnalyzeSchema(TuneSchema):
    """`python -m qflow.analyze`: the keys of a study, and the analyses to run."""

    stages: list[Annotated[str, OneOf(STAGES)]] = field(
        default_factory=lambda: ["badcase", "layers", "sensitivity", "advice"]
    )
    """Any of badcase, layers, sensitivity, advice; or qat_debug alone."""
    prefixes: list[str] = field(default_factory=list)
    """Operators of the layer table, by the start of their name; all if neither prefixes nor types are given."""
    types: list[str] = field(default_factory=list)
    """Operators of the layer table, by type."""


@dataclass(kw_only=True)
class CostCommandSchema(TuneSchema):
    """`python -m qflow.cost`: the cost of a qconfig, or `fit`, which fits the parameters of the model."""

    mode: Annotated[str, OneOf(("report", "fit"))] = "report"
    """report or fit."""
    data: str | None = None
    """For fit: CSV file of networks and their measured times."""
    out: str | None = None
    """For fit: device file to write, or whose cost section to replace."""
    fps: Annotated[float, Above(0.0)] | None = None
    """Frame rate at which bandwidth is printed; null takes the rate of a fully loaded BPU."""


@dataclass(kw_only=True)
class PromoteSchema:
    """`python -m qflow.promote`: the run to promote, or the study whose best run it promotes."""

    study: str = MISSING
    """Study whose best trial is promoted."""
    run: str | None = None
    """MLflow run id of a trial; null takes the best trial of `study`."""
    root: str = MISSING
    """Folder of the stores, results and caches; QFLOW_HOME sets it too."""
    dry_run: bool = False
    """Judge, and register nothing."""
    rollback: bool = False
    """Move the alias back to the version before, and do nothing else."""
    objective: PromoteGoalSchema = field(default_factory=PromoteGoalSchema)
    tracking: PromoteTrackingSchema = field(default_factory=PromoteTrackingSchema)
    security: SecuritySchema = field(default_factory=SecuritySchema)
    gate: GateSchema = field(default_factory=GateSchema)


@dataclass(kw_only=True)
class StorageSchema:
    """Where the searches are."""

    storage: str | None = None
    """Database of the searches, if it is not optuna.db in `root`."""


@dataclass(kw_only=True)
class ExportSchema:
    """`python -m qflow.export`: the trial to export, the targets, and the folder to write to."""

    study: str = "${task.name}/int8_int16"
    """Study whose best trial is exported; unless it is stated, the champion comes first."""
    root: str = MISSING
    """Folder of the stores, results and exports; QFLOW_HOME sets it too."""
    task: TaskSchema = field(default_factory=TaskSchema)
    tracking: TrackingSchema = field(default_factory=TrackingSchema)
    security: SecuritySchema = field(default_factory=SecuritySchema)
    source: str | None = None
    """The trial, also written from=...: a run, model version, folder or .zip; null takes the champion or the best."""
    target: Any = "plugin"
    """plugin, plugin35, hmct, onnx, torch, qflow, or a list of them; on the command line also names with commas."""
    out: str | None = None
    """Folder; each target writes to a folder of its own name in it; null takes export/ in `root`."""
    strict: bool = False
    """Exit code 1 if a target does not say all that was judged."""
    bundle: str | None = None
    """New .zip to which the study is written with its runs and files; no target is written then."""
    unpack: str | None = None
    """A .zip that `bundle` wrote, also written import=...: its study is added to this store."""
    search: StorageSchema = field(default_factory=StorageSchema)


@dataclass(kw_only=True)
class ReportSchema:
    """`python -m qflow.report`: the study whose report is rendered again."""

    study: str = MISSING
    """Study to report."""
    root: str = MISSING
    """Folder of the stores, results and caches; QFLOW_HOME sets it too."""
    tracking: ReportTrackingSchema = field(default_factory=ReportTrackingSchema)


@dataclass(kw_only=True)
class DoctorSchema:
    """`python -m qflow.doctor`: stores and folder to examine."""

    root: str = MISSING
    """Folder of the stores, results and caches; QFLOW_HOME sets it too."""
    fix: bool = False
    """Mend what can be mended without losing a result (--fix)."""
    plugin: bool = False
    """Check an installed horizon_plugin_pytorch against what engine=plugin relies on, and nothing else."""
    tracking: StoreSchema = field(default_factory=StoreSchema)
    search: StorageSchema = field(default_factory=StorageSchema)


@dataclass(kw_only=True)
class TrialCommandSchema(TuneSchema):
    """`python -m qflow.trial`: the trial of the configuration, or one of the store again."""

    from_run: str | None = None
    """Run again this trial: a run id, models:/NAME@ALIAS, a folder or a .zip; null runs the configuration's."""
    security: SecuritySchema = field(default_factory=SecuritySchema)


@dataclass(kw_only=True)
class CompareSchema:
    """`python -m qflow.compare`."""

    sources: list[str] = field(default_factory=list)
    """What is compared with the first: run ids, models:/NAME@ALIAS, folders, .zip, .json or imported files."""
    check: bool = False
    """Exit with 1 if anything differs (--check)."""
    engine: bool = False
    """Compare qflow's engine with the installed plugin on one trial, operator by operator (--engine)."""
    out: str | None = None
    """HTML file to write."""
    root: str = MISSING
    """Folder of the stores, results and caches; QFLOW_HOME sets it too."""
    tracking: StoreSchema = field(default_factory=StoreSchema)
    security: SecuritySchema = field(default_factory=SecuritySchema)


@dataclass(kw_only=True)
class DescribeSchema:
    """`python -m qflow.describe`."""

    about: list[str] = field(default_factory=list)
    """A command, and then one of its groups or keys; empty for the table of all commands."""
    result: bool = False
    """Describe the JSON document that the command writes, not its settings (--result)."""


@dataclass(kw_only=True)
class TrainingSchema:
    """The arguments of workflows/train_float.py::train, the loss, and the output file of the weights."""

    loss: str = MISSING
    """Dotted name of the loss, a function of (outputs, batch)."""
    epochs: Annotated[int, Between(1, 1_000_000)] = MISSING
    """Passes over the training data."""
    learning_rate: Annotated[float, Between(0.0, 10.0)] = MISSING
    """Learning rate of the first step."""
    weight_decay: Annotated[float, Between(0.0, 10.0)] = 0.0
    """Weight decay of the optimizer."""
    batch_size: Annotated[int, Between(1, 1_000_000)] = 64
    """Training batch size."""
    seed: Annotated[int, Between(0, LARGEST_SEED)] = 0
    """Seed of the initial weights and of the order of the data."""
    output: str = "${hydra:runtime.cwd}/weights.safetensors"
    """File to which the trained weights are written."""


@dataclass(kw_only=True)
class TrainFloatSchema:
    """`python -m workflows.train_float`."""

    task: TaskSchema = field(default_factory=TaskSchema)
    metric: MetricSchema = field(default_factory=MetricSchema)
    executor: ExecutorSchema = field(default_factory=ExecutorSchema)
    training: TrainingSchema = field(default_factory=TrainingSchema)


@dataclass(kw_only=True)
class InitSchema:
    """`python -m qflow.init`."""

    kind: str = "classification"
    """What the task is: classification, detection (pictures with COCO annotations), or module (no labels)."""


SCHEMAS: dict[str, type] = {
    "init": InitSchema,
    "tune": TuneSchema,
    "check": CheckSchema,
    "analyze": AnalyzeSchema,
    "cost": CostCommandSchema,
    "trial": TrialCommandSchema,
    "compare": CompareSchema,
    "promote": PromoteSchema,
    "export": ExportSchema,
    "report": ReportSchema,
    "doctor": DoctorSchema,
    "describe": DescribeSchema,
    "train_float": TrainFloatSchema,
}


@functools.cache
def register_schema(name: str) -> None:
    """Register the schema of a command with Hydra under the name that conf/<name>.yaml uses."""
    from hydra.core.config_store import ConfigStore  # heavy: a line stands on the terminal before it is imported

    ConfigStore.instance().store(name=f"{name}_schema", node=SCHEMAS[name])
