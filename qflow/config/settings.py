"""From a composed configuration to records: settings of a trial, the search space, and back from a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qflow.config.door import explain
from qflow.config.schema import TuneSchema
from qflow.core.errors import ConfigError
from qflow.core.settings import CalibrationSettings, QatSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.search.domain import Choice, Domain, Interval, Range, Scalar


def trial_settings(config: DictConfig, params: Mapping[str, Scalar] | None = None) -> TrialSettings:
    """Settings of one trial: the configuration with the search's `params` in place. Raises ConfigError."""
    changed = with_params(config, params or {})
    plain = {k: OmegaConf.to_container(changed[k], resolve=True) for k in ("calibration", "qconfig", "qat")}
    return TrialSettings(
        calibration=CalibrationSettings(**plain["calibration"]),  # type: ignore[arg-type]
        qconfig=QConfigSettings(**plain["qconfig"]),  # type: ignore[arg-type]
        qat=QatSettings(**plain["qat"]),  # type: ignore[arg-type]
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


def check_executor(config: DictConfig) -> None:
    """Refuse an executor that cannot work. Raises ConfigError."""
    if config.executor.kind != "serial":
        raise ConfigError(f"executor.kind is serial, but got {config.executor.kind!r}. Use executor=serial.")
    if config.executor.threads < 0:
        raise ConfigError(f"executor.threads is at least 0 (0 leaves it to torch), but got {config.executor.threads}.")


SAMPLERS = ("tpe", "nsga2", "gp", "random")
SEARCHABLE = ("calibration", "qconfig", "qat")


def search_space(config: DictConfig) -> dict[str, Domain]:
    """`search.space` as domains by dotted key; every value it can give is checked. Raises ConfigError."""
    space = {key: parse_domain(key, text) for key, text in _flat(config.search.space)}
    for key, domain in space.items():
        if key.split(".")[0] not in SEARCHABLE:
            raise ConfigError(f"A search varies keys of calibration, qconfig or qat, but got {key}. Remove it.")
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
    entries: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    found: list[tuple[str, Any]] = []
    for key, value in entries.items():
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


def root_dir(config: DictConfig) -> Path:
    """Absolute folder of stores and scratch files, made if missing; an empty QFLOW_HOME counts as unset.

    Raises ConfigError where it cannot be made.
    """
    root = Path(config.root or "qflow_out").expanduser().resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"root is a folder that can be written, but got {root}: {error.strerror}.") from error
    return root


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


def required(config: DictConfig, key: str) -> Any:
    """A mandatory value; ConfigError says what to add where it is missing."""
    try:
        return OmegaConf.select(config, key, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
