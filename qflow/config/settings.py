"""From a composed configuration to records: settings of a trial with searched values in place; and back from a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qflow.config.command import explain
from qflow.config.command_schema import TuneSchema
from qflow.core.errors import ConfigError
from qflow.core.settings import CalibrationSettings, QatSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.search.domain import Scalar

MAPPINGS = ("qconfig.modules", "qat.rates")
"""Mappings whose keys name the user's modules: what comes behind them is one key, dots and all."""


def trial_settings(config: DictConfig, params: Mapping[str, Scalar] | None = None) -> TrialSettings:
    """Settings of one trial: the configuration with the search's `params` in place. Raises ConfigError."""
    changed = with_params(config, params) if params else config
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
    """A copy of the configuration with dotted keys set; types are checked. Raises ConfigError.

    With searched modules among them the longest name comes first in `qconfig.modules`: the first that covers an
    operator decides, and a part shall be able to differ from the whole.
    """
    changed = config.copy()
    for key, value in params.items():
        try:
            if mapping := owner(key):
                node = OmegaConf.select(changed, mapping)
                with open_dict(node):
                    node[key.removeprefix(f"{mapping}.")] = value
                continue
            if OmegaConf.select(changed, key, throw_on_missing=False) is None and not _exists(changed, key):
                raise ConfigError(f"A search key must exist in the configuration, but got {key}. See --cfg job.")
            OmegaConf.update(changed, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"search.space.{key}: {explain(error)}") from error
    if any(owner(key) == "qconfig.modules" for key in params):
        modules: dict[str, Any] = plain(changed.qconfig.modules)
        changed.qconfig.modules = dict(sorted(modules.items(), key=lambda entry: -len(entry[0])))
    return changed


def owner(key: str) -> str:
    """The mapping of MAPPINGS that a dotted key lies in; empty where it lies in none."""
    return next((mapping for mapping in MAPPINGS if key.startswith(f"{mapping}.")), "")


def current(config: DictConfig, key: str, where: str = "") -> Any:
    """The configuration's own value of a key; None for a name that a mapping of modules does not hold.

    Raises ConfigError that starts with `where` for a key that does not exist.
    """
    if mapping := owner(key):
        return plain(OmegaConf.select(config, mapping)).get(key.removeprefix(f"{mapping}."))
    if not _exists(config, key):
        place = f"{where} is on a key" if where else "A search key is one"
        raise ConfigError(f"{place} of the configuration, but got {key}, which it does not have. See --cfg job.")
    return OmegaConf.select(config, key)


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
    """The configuration without interpolations, for the run that is to be rebuilt from it.

    In its own order: of two names in `qconfig.modules` that cover an operator the first decides.
    """
    return OmegaConf.to_yaml(config, resolve=True)


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
