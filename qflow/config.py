"""The only home of Hydra: typed schemas, composition, the sweep grammar, and building a task from `_target_`s.

A configuration is checked in three steps before any heavy import: Hydra composes it against these schemas
(unknown keys, types), `settings` builds the records of qflow/core/settings.py (illegal values), and every value
that the search space can propose goes through the same two steps.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qflow.core.errors import ConfigError, QflowError
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.search.domain import Choice, Domain, Interval, Range, Scalar

if TYPE_CHECKING:
    from qflow.tasks.task import Task

# ---- schemas: what exists, and of which type. Keyword-only and not frozen, as Hydra needs them. --------------------


@dataclass(kw_only=True)
class TaskSchema:
    """What is tuned. Either one `_target_` that gives a Task, or model, data and metric apart."""

    name: str = MISSING
    _target_: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metric: dict[str, Any] = field(default_factory=dict)
    float_metric: float | None = None
    """What the float model must reach on the evaluation data; null takes what is measured."""
    tolerance: float = 0.002
    deploy_shape: Any = None
    """Shape at which cost is computed: one list, or a mapping for named inputs; null takes one evaluated sample."""
    batch_size: int = 32
    """Evaluation batch size."""


@dataclass(kw_only=True)
class RulesSchema:
    """Fields of qflow.core.device.DeviceRules."""

    int8_inputs: dict[str, list[int]] = field(default_factory=dict)
    int8_outputs: list[str] = field(default_factory=list)
    fused_add_int8: bool = True
    dual_int16: bool = False
    matmul_int16_inputs: int = 1
    float16_kinds: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class CostSchema:
    """Fields of qflow.cost.latency.CostModel."""

    clock_ghz: float = MISSING
    fixed_ms: float = MISSING
    gemm_us_ghz: float = MISSING
    gmac_per_ms_ghz: float = MISSING
    lut_melem_per_ms_ghz: float = MISSING
    softmax_melem_per_ms_ghz: float = MISSING
    weight_mb_per_ms: float = MISSING
    host_ms: float = MISSING
    float_melem_per_ms: float = MISSING
    host_dequantize: bool = False
    mac_factors: dict[str, float] = field(default_factory=dict)
    vector_factors: dict[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class DeviceSchema:
    """A march: what it allows and what it costs."""

    march: str = MISSING
    oe_version: str = MISSING
    rules: RulesSchema = field(default_factory=RulesSchema)
    cost: CostSchema = field(default_factory=CostSchema)


@dataclass(kw_only=True)
class CalibrationSchema:
    """Fields of CalibrationSettings."""

    method: str = "mse"
    batch_size: int = 16
    steps: int = 16
    percentile: float = 99.99
    averaging_constant: float | None = None
    int16_margin: float = 1.25
    divisor: str = "guide"


@dataclass(kw_only=True)
class QConfigSchema:
    """Fields of QConfigSettings."""

    template: str = "qint8"
    int16_ratio: float = 0.0
    modules: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class SensitivitySchema:
    """Fields of SensitivitySettings."""

    metric: str = "L1"
    bad_cases: int = 16
    search_samples: int = 256


@dataclass(kw_only=True)
class QatSchema:
    """Quantization-aware training after calibration; 0 steps: none."""

    steps: int = 0
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    batch_size: int = 32


@dataclass(kw_only=True)
class SearchSchema:
    """Which trials are run: sampler, budget, space."""

    sampler: str = "tpe"
    n_trials: int = 16
    timeout: float | None = None
    """Seconds after which no further trial starts."""
    space: dict[str, Any] = field(default_factory=dict)
    """Configuration key -> choice(...), interval(...), range(...) or tag(log, interval(...)), in Hydra's grammar."""
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    """Points tried right after the baselines, before the sampler's own."""


@dataclass(kw_only=True)
class ObjectiveSchema:
    """The accuracy goal."""

    max_drop: float = 0.01
    """Largest loss against float, in the metric's own units."""


@dataclass(kw_only=True)
class TrackingSchema:
    """Where runs go."""

    uri: str | None = None
    """MLflow tracking URI; null for a local store in `root`."""
    experiment: str = "${task.name}"
    registered_model: str = "${task.name}"
    alias: str = "champion"


@dataclass(kw_only=True)
class ExecutorSchema:
    """Where trials run."""

    kind: str = "serial"
    device: str = "cpu"
    threads: int = 0
    """Threads of torch; 0 leaves torch's own choice."""


@dataclass(kw_only=True)
class TuneSchema:
    """`python -m qflow.tune`."""

    workflow: str = MISSING
    """File in workflows/ that runs the stages; set by +experiment=<name>."""
    study: str = "${task.name}/${workflow}"
    """Name of the study; the same name goes on where it stopped."""
    seed: int = 0
    root: str = MISSING
    task: TaskSchema = field(default_factory=TaskSchema)
    device: DeviceSchema = field(default_factory=DeviceSchema)
    calibration: CalibrationSchema = field(default_factory=CalibrationSchema)
    qconfig: QConfigSchema = field(default_factory=QConfigSchema)
    sensitivity: SensitivitySchema = field(default_factory=SensitivitySchema)
    qat: QatSchema = field(default_factory=QatSchema)
    search: SearchSchema = field(default_factory=SearchSchema)
    objective: ObjectiveSchema = field(default_factory=ObjectiveSchema)
    tracking: TrackingSchema = field(default_factory=TrackingSchema)
    executor: ExecutorSchema = field(default_factory=ExecutorSchema)


@dataclass(kw_only=True)
class PromoteSchema(TuneSchema):
    """`python -m qflow.promote`: which run, or the best of which study."""

    run: str | None = None
    """MLflow run id of a trial; null takes the best trial of `study`."""


@dataclass(kw_only=True)
class TrainingSchema:
    """Arguments of workflows/train_float.py::train, the loss, and where the weights go."""

    loss: str = MISSING
    epochs: int = MISSING
    learning_rate: float = MISSING
    weight_decay: float = 0.0
    batch_size: int = 64
    seed: int = 0
    output: str = "${hydra:runtime.cwd}/weights.safetensors"


@dataclass(kw_only=True)
class TrainFloatSchema:
    """`python -m workflows.train_float`."""

    task: TaskSchema = field(default_factory=TaskSchema)
    executor: ExecutorSchema = field(default_factory=ExecutorSchema)
    training: TrainingSchema = field(default_factory=TrainingSchema)


SCHEMAS: dict[str, type] = {"tune": TuneSchema, "promote": PromoteSchema, "train_float": TrainFloatSchema}
GROUPS = ("task", "device", "calibration", "qat", "search", "objective", "tracking", "executor", "experiment", "debug")


def conf_dir() -> Path:
    """The shipped configuration: conf/ of the repository, or qflow/conf in a wheel."""
    spec = importlib.util.find_spec("qflow.conf")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(__file__).resolve().parent.parent / "conf"


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that conf/*.yaml use."""
    store = ConfigStore.instance()
    for name, node in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=node)


# ---- doors ------------------------------------------------------------------------------------------------------------


def run_door(name: str, act: Callable[[DictConfig], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Compose conf/<name>.yaml with the command line and call `act`; exit with its code, or 2 in one line.

    Hydra's own flags (--help, --cfg job, --shell-completion, --config-dir) work. With QFLOW_DEBUG=1 errors keep
    their traceback.
    """
    import hydra

    debug = os.environ.get("QFLOW_DEBUG", "") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of to Hydra's own printer
    warnings.filterwarnings("ignore", message=".*version_base.*")
    sys.path.insert(0, os.getcwd())  # the user's own task lies in the folder the user is in
    register_schemas()
    arguments = list(sys.argv[1:] if argv is None else argv)
    ends: list[int | BaseException] = []

    def job(config: DictConfig) -> None:
        try:
            require_known(config, name)
            ends.append(act(config))
        except (Exception, KeyboardInterrupt) as error:  # raised again below, past Hydra's own printing
            ends.append(error)

    try:
        sys.argv = [sys.argv[0], *rewrite(arguments)]
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
        if ends and isinstance(ends[0], BaseException):
            raise ends[0]
    except KeyboardInterrupt:
        _fail("Interrupted. What is finished is kept; the same command goes on from there.", 130)
    except QflowError as error:
        if debug:
            raise
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        _fail(explain(error, name))
    raise SystemExit(ends[0] if ends else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"qflow: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def require_known(config: DictConfig, name: str) -> None:
    """Refuse keys that no schema has: `+key=value` would add them unseen. Raises ConfigError."""
    try:
        unresolved = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # as text: schemas forgotten
        OmegaConf.merge(OmegaConf.structured(SCHEMAS[name]), unresolved)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, name)) from error


def rewrite(arguments: Sequence[str]) -> list[str]:
    """Let users write what they mean: `experiment=x` for `+experiment=x`, `key=choice(a,b)` to search a key."""
    out = []
    for argument in arguments:
        if argument.startswith(("experiment=", "debug=")):
            argument = f"+{argument}"
        override = _parsed(argument)
        if override is not None and override.is_sweep_override():
            key, value = override.key_or_group.lstrip("+"), argument.split("=", 1)[1]
            argument = f"++search.space.{key}='{value}'" if "'" not in value else f'++search.space.{key}="{value}"'
        out.append(argument)
    return out


def _parsed(argument: str) -> Override | None:
    if argument.startswith("-") or "=" not in argument:
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None  # Hydra will say what is wrong with it


def experiments() -> list[str]:
    """Names of the experiments that run a workflow of qflow.tune."""
    return sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml") if "\nworkflow:" in p.read_text())


def explain(error: Exception, config: str = "tune") -> str:
    """One line for what Hydra or OmegaConf found wrong: the key or value, and those that exist."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    key = str(getattr(cause, "full_key", "") or "")
    first = " ".join(str(error).split())
    if "not in" in text and key:
        schema = OmegaConf.structured(SCHEMAS[config])
        parent = key.rpartition(".")[0]
        node = OmegaConf.select(schema, parent) if parent else schema
        known = ", ".join(str(k) for k in node) if node is not None else ""
        return f"A key must exist in the configuration, but got {key}. Keys of {parent or config}: {known}."
    if "No match in the defaults list" in first or ("Could not override" in first and "." not in first.split("'")[1]):
        name = first.split("'")[1]
        return f"A group must exist, but got {name}. Groups: {', '.join(GROUPS)}."
    if "Could not find" in first or ("In '" in first and "Could not" in first):
        wanted = first.split("Could not find '")[-1].split("'")[0]
        options = first.partition("Available options in")[2].partition(":")[2].split("Config search path")[0].split()
        shown = ", ".join(o.strip("',") for o in options)
        return f"A group option must exist, but got {wanted}. Options: {shown}."
    if "Missing mandatory value" in text and key == "workflow":
        names = experiments()
        return f"A study needs an experiment, but got none. Add +experiment=<name>: {', '.join(names)}."
    if "Missing mandatory value" in text:
        return f"A value is needed for {key}, but got none. Set {key}=..., or add +experiment=<name>."
    if key and key not in text.split("full_key")[0]:
        return f"{text.split(' full_key')[0].rstrip('.')}, for {key}."
    return text if len(text) > 8 else first


# ---- from configuration to records and objects ---------------------------------------------------------------------


def trial_settings(config: DictConfig, params: Mapping[str, Scalar] | None = None) -> TrialSettings:
    """Settings of one trial: the configuration with the search's `params` in place. Raises ConfigError."""
    changed = with_params(config, params or {})
    plain = {k: OmegaConf.to_container(changed[k], resolve=True) for k in ("calibration", "qconfig")}
    return TrialSettings(
        calibration=CalibrationSettings(**plain["calibration"]),  # type: ignore[arg-type]
        qconfig=QConfigSettings(**plain["qconfig"]),  # type: ignore[arg-type]
    )


def sensitivity_settings(config: DictConfig) -> SensitivitySettings:
    """Settings of the sensitivity stage."""
    return SensitivitySettings(**OmegaConf.to_container(config.sensitivity, resolve=True))  # type: ignore[arg-type]


def with_params(config: DictConfig, params: Mapping[str, Scalar]) -> DictConfig:
    """A copy of the configuration with dotted keys set; types are checked. Raises ConfigError."""
    changed = config.copy()
    for key, value in params.items():
        try:
            if OmegaConf.select(changed, key, throw_on_missing=False) is None and not _exists(changed, key):
                raise ConfigError(f"A search key must exist in the configuration, but got {key}. See --cfg job.")
            OmegaConf.update(changed, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"search.space.{key}: {explain(error)}") from error
    return changed


def _exists(config: DictConfig, key: str) -> bool:
    parent, _, leaf = key.rpartition(".")
    try:
        node = OmegaConf.select(config, parent) if parent else config
    except OmegaConfBaseException:
        return False
    return isinstance(node, DictConfig) and leaf in node


SAMPLERS = ("tpe", "nsga2", "gp", "random")
SEARCHABLE = ("calibration", "qconfig")


def search_space(config: DictConfig) -> dict[str, Domain]:
    """`search.space` as domains by dotted key; every value it can give is checked. Raises ConfigError."""
    space = {key: parse_domain(key, text) for key, text in _flat(config.search.space)}
    for key, domain in space.items():
        if key.split(".")[0] not in SEARCHABLE:
            raise ConfigError(f"A search varies keys of {' or '.join(SEARCHABLE)}, but got {key}. Remove it.")
        values = domain.values if isinstance(domain, Choice) else _ends(domain)
        for value in values:
            trial_settings(config, {key: value})
    return space


def _ends(domain: Domain) -> tuple[Scalar, ...]:
    if isinstance(domain, Interval):
        return (domain.normal(domain.low), domain.normal(domain.high))
    points = tuple(domain.points())
    return (points[0], points[-1]) if points else ()


def _flat(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    found: list[tuple[str, Any]] = []
    for key, value in plain.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((f"{prefix}{key}", value))
    return found


def parse_domain(key: str, text: Any) -> Domain:
    """Read `choice(...)`, `interval(...)`, `range(...)`, with `tag(log, ...)` or `int(...)`. Raises ConfigError."""
    rule = f"A search value is choice(...), interval(...), range(...) or tag(log, interval(...)), but got {text!r}"
    try:
        override = OverridesParser.create().parse_override(f"{key}={text}")
    except HydraException:
        raise ConfigError(f"{rule} for {key}. Mend the brackets.") from None
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return Choice(tuple(_scalar(v) for v in value.list))
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int) and "int" in value.tags
        return Interval(value.start, value.end, log="log" in value.tags, integer=whole)  # type: ignore[arg-type]
    if isinstance(value, RangeSweep):
        return Range(value.start, value.stop, value.step)  # type: ignore[arg-type]
    raise ConfigError(f"{rule} for {key}. To fix the value, set {key} itself.")


def _scalar(value: Any) -> Scalar:
    text = getattr(value, "text", None)  # Hydra's quoted strings
    return text if isinstance(text, str) else value


def resolved_yaml(config: DictConfig) -> str:
    """The configuration without interpolations, for the run that is to be rebuilt from it."""
    return OmegaConf.to_yaml(config, resolve=True, sort_keys=True)


def plain(config: Any) -> Any:
    """Builtin containers of a configuration node."""
    return OmegaConf.to_container(config, resolve=True)


def load_resolved(text: str) -> DictConfig:
    """A configuration from what `resolved_yaml` wrote, against the schema. Raises ConfigError."""
    try:
        loaded = OmegaConf.create(text)
        known = set(TuneSchema.__dataclass_fields__)
        kept = OmegaConf.create({k: v for k, v in loaded.items() if k in known})
        merged = OmegaConf.merge(OmegaConf.structured(TuneSchema), kept)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The run's configuration must fit this qflow version, but got: {explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def build_task(config: DictConfig) -> Task:
    """Import and call the `_target_`s of the task. Raises ConfigError where one cannot be found or called."""
    from qflow.tasks.task import Task, make_task

    node = config.task
    device = config.executor.device
    stated: dict[str, Any] = {
        "stated_metric": node.float_metric,
        "tolerance": node.tolerance,
        "deploy_shape": plain(node).get("deploy_shape"),
    }
    if node._target_:
        task = _call({"_target_": node._target_}, "task")
        if not isinstance(task, Task):
            raise ConfigError(f"task._target_ gives a qflow Task, but got {type(task).__name__}. Use make_task(...).")
        return task
    parts = {}
    for part in ("model", "data", "metric"):
        target = plain(node[part])
        if not target.get("_target_"):
            raise ConfigError(f"A task needs task.{part}._target_, but got none. Name your class or function.")
        parts[part] = _call(target, f"task.{part}")
    return make_task(name=node.name, device=device, **parts, **stated)


def get_function(name: str, where: str) -> Callable[..., Any]:
    """The function at a dotted name. Raises ConfigError."""
    from hydra.utils import get_method

    try:
        return get_method(name)
    except (HydraException, ImportError, ValueError) as error:
        raise ConfigError(f"{where} must be the dotted name of a function, but got {name}: {error}") from error


def _call(node: Mapping[str, Any], where: str) -> Any:
    from hydra.utils import instantiate

    try:
        return instantiate(node)
    except HydraException as error:
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())
        raise ConfigError(f"{where}._target_ must import and run, but got: {text}") from error


def required(config: DictConfig, key: str) -> Any:
    """A mandatory value; ConfigError says what to add where it is missing."""
    try:
        return OmegaConf.select(config, key, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
