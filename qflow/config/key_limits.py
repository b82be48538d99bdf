"""The limits of every key of a command, from the types of its schema, held against a composed configuration.

A schema class whose docstring is `Fields of <module>.<class>.` has the limits of the fields of that class.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from qflow.config.keys import settings_of
from qflow.core.device_rules import DeviceRules
from qflow.core.limits import check_value
from qflow.core.repair_settings import RepairSettings
from qflow.core.settings import (
    CalibrationSettings,
    QatSettings,
    QConfigSettings,
    SensitivitySettings,
    TeacherSettings,
)
from qflow.cost_model.model import CostModel

SETTINGS = {
    kind.__name__: kind
    for kind in (
        *(CalibrationSettings, QConfigSettings, SensitivitySettings, RepairSettings, QatSettings, TeacherSettings),
        *(DeviceRules, CostModel),
    )
}
"""The classes of settings that schema classes name as those whose fields they have."""


def hints_of(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a schema class with their limits, its own or those of the settings it names."""
    hints = get_type_hints(kind, include_extras=True)
    if stated_by := settings_of(kind):
        stated = get_type_hints(SETTINGS[stated_by], include_extras=True)
        hints = {name: hint if "Annotated" in str(hint) else stated.get(name, hint) for name, hint in hints.items()}
    return hints


@functools.cache
def limits_of(kind: type, prefix: str = "") -> Mapping[str, Any]:
    """Return key -> its type, for every key below a schema class whose type states a limit."""
    plain, found = get_type_hints(kind), dict[str, Any]()
    for name, hint in hints_of(kind).items():
        if is_dataclass(plain[name]):
            found |= limits_of(plain[name], f"{prefix}{name}.")
        elif "Annotated" in str(hint):
            found[f"{prefix}{name}"] = hint
    return found


def require_limits(config: DictConfig, kind: type) -> None:
    """Raise ConfigError for the first key that is beyond the limits that its type states; a missing one has none."""
    for key, hint in limits_of(kind).items():
        value = OmegaConf.select(config, key)
        check_value(key, OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value, hint)
