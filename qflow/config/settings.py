"""Conversion of a composed configuration to settings, with searched values in place, and of a run's YAML back."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from qflow.config.command_schema import TuneSchema
from qflow.config.explain import explain
from qflow.core.credentials import masked_values
from qflow.core.errors import ConfigError
from qflow.core.repair_settings import RepairSettings
from qflow.core.settings import CalibrationSettings, QatSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.search.domain import Scalar
from qflow.tracking.patience import Patience

SEARCHABLE = ("calibration", "qconfig", "qat", "repair")
"""Groups that make up the settings of a trial, so that a search may vary their keys."""
MODULES = "qconfig.modules"
MAPPINGS = (MODULES, "qat.rates")
"""Mappings whose keys name the user's modules; the rest of a dotted key is one such name."""


def trial_settings(config: DictConfig, params: Mapping[str, Scalar] | None = None) -> TrialSettings:
    """Return the settings of one trial: the configuration with `params` of the search. Raises ConfigError."""
    changed = with_params(config, params) if params else config
    plain = {k: OmegaConf.to_container(changed[k], resolve=True) for k in SEARCHABLE}
    return TrialSettings(
        calibration=CalibrationSettings(**plain["calibration"]),  # type: ignore[arg-type]
        qconfig=QConfigSettings(**plain["qconfig"]),  # type: ignore[arg-type]
        qat=QatSettings(**plain["qat"]),  # type: ignore[arg-type]
        repair=RepairSettings(**plain["repair"]),  # type: ignore[arg-type]
    )


def patience(config: DictConfig) -> Patience:
    """Return the patience of a command with its tracking store. Raises ConfigError for no number of at least 0."""
    seconds = float(config.tracking.patience)
    if not 0 <= seconds < math.inf:
        raise ConfigError(f"tracking.patience is a number of seconds of at least 0, but got {seconds}. Take 600.")
    return Patience(seconds)


def sensitivity_settings(config: DictConfig) -> SensitivitySettings:
    """Return the settings of the sensitivity stage."""
    return SensitivitySettings(**OmegaConf.to_container(config.sensitivity, resolve=True))  # type: ignore[arg-type]


def with_params(config: DictConfig, params: Mapping[str, Scalar]) -> DictConfig:
    """Return a copy of the configuration with dotted keys set; types are checked. Raises ConfigError.

    The value of `qconfig.modules` itself is a mapping, which is added to the configured one.
    If modules are searched or given, the longest names come first in `qconfig.modules`, because the first name that
    covers an operator decides, and a submodule must be able to differ from its parent. If the learning rate is, the
    rates of single modules keep their ratio to it, as the guide asks. What no search changes is shared.
    """
    changed = _copied(config, {*SEARCHABLE, *(key.split(".")[0] for key in params)})
    for key, value in {**_kept_ratios(config, params), **params}.items():
        try:
            if mapping := MODULES if key == MODULES else owner(key):
                node = OmegaConf.select(changed, mapping)
                with open_dict(node):
                    node.update(value if key == MODULES else {key.removeprefix(f"{mapping}."): value})
                continue
            if OmegaConf.select(changed, key, throw_on_missing=False) is None and not _exists(changed, key):
                raise ConfigError(f"A search key must exist in the configuration, but got {key}. See --cfg job.")
            OmegaConf.update(changed, key, value)
        except OmegaConfBaseException as error:
            raise ConfigError(f"search.space.{key}: {explain(error)}") from error
    if any(key == MODULES or owner(key) == MODULES for key in params):
        modules: dict[str, Any] = plain(changed.qconfig.modules)
        changed.qconfig.modules = dict(sorted(modules.items(), key=lambda entry: -len(entry[0])))
    return changed


class ConfigAt:
    """`with_params` of one configuration. A point is asked for several times in a row, and a copy takes time."""

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self._point: list[tuple[str, Scalar]] = []
        self._last = config

    def __call__(self, params: Mapping[str, Scalar]) -> DictConfig:
        """Return the configuration at `params`, to be read only. Raises ConfigError."""
        if (point := list(params.items())) != self._point:
            self._last, self._point = with_params(self._config, params), point
        return self._last


def _copied(config: DictConfig, groups: Collection[str]) -> DictConfig:
    """Return a copy of these groups, which shares the others: the device alone has more nodes than they have."""
    others = [node for key in config if key not in groups and (node := config._get_node(key)) is not None]
    return copy.deepcopy(config, {id(node): node for node in others})


def _kept_ratios(config: DictConfig, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return `qat.rates` in proportion to a changed `qat.learning_rate`."""
    before, after = config.qat.learning_rate, params.get("qat.learning_rate")
    if not isinstance(after, (int, float)) or after == before:
        return {}
    known = QatSettings(rates=plain(config.qat.rates), learning_rate=before)
    return {f"qat.rates.{name}": rate for name, rate in known.rates_at(after).items()}


def owner(key: str) -> str:
    """Return the mapping of MAPPINGS that contains a dotted key; empty if none does."""
    return next((mapping for mapping in MAPPINGS if key.startswith(f"{mapping}.")), "")


def current(config: DictConfig, key: str, where: str = "") -> Any:
    """Return the configuration's value of a key; None for a module name that its mapping does not hold.

    Raises ConfigError, which starts with `where`, for a key that does not exist.
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


def root_dir(config: DictConfig) -> Path:
    """Return the absolute folder of stores and scratch files; create it if missing. An empty QFLOW_HOME is ignored.

    Raises ConfigError if it cannot be created.
    """
    given = Path(os.path.expanduser(config.root or "qflow_out"))  # ~x stays where no user x has a home
    try:
        root = given.resolve()
        str(root).encode()  # stores keep it as text
        root.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links is a RuntimeError up to Python 3.12
        why = getattr(error, "strerror", None) or ("Symlink loop" if isinstance(error, RuntimeError) else error)
        shown = ascii(str(given)) if isinstance(error, UnicodeEncodeError) else given
        raise ConfigError(f"root is a folder that can be written, but got {shown}: {why}. Name another.") from error
    return root


def resolved_yaml(config: DictConfig) -> str:
    """Return the configuration without interpolations, from which a run can be rebuilt.

    The order of the keys is kept, because the first name in `qconfig.modules` that covers an operator decides.
    Passwords in addresses are hidden: a run says where it was kept, and whoever reads it has an account of their own.
    """
    values = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    hidden = masked_values(values)
    return OmegaConf.to_yaml(config if hidden == values else OmegaConf.create(hidden), resolve=True)


def plain(config: Any) -> Any:
    """Return a configuration node as builtin containers."""
    return OmegaConf.to_container(config, resolve=True)


def load_resolved(text: str) -> DictConfig:
    """Load the text of `resolved_yaml` and check it against the schema. Raises ConfigError."""
    try:
        loaded = OmegaConf.create(text)
        if not isinstance(loaded, DictConfig):
            raise ConfigError("The run's configuration is a mapping, but got a list. Take another run.")
        known = set(TuneSchema.__dataclass_fields__)
        kept = OmegaConf.create({k: v for k, v in loaded.items() if k in known})
        merged = OmegaConf.merge(OmegaConf.structured(TuneSchema), kept)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The run's configuration must fit this qflow version, but got: {explain(error)}") from error
    except (yaml.YAMLError, ValueError, TypeError, AssertionError) as error:  # a key twice, two documents, a number
        words = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"The run's configuration is one YAML mapping, but got: {words}. Take another run."
        ) from error
    assert isinstance(merged, DictConfig)
    return merged


def required(config: DictConfig, key: str) -> Any:
    """Return a mandatory value. If it is missing, the ConfigError names what to add."""
    try:
        return OmegaConf.select(config, key, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
