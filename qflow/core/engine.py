"""The engines that quantize a model for a trial, by name. A run names one of these and never code."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean


class EngineName(str, Enum):
    """Who prepares, calibrates and evaluates."""

    qflow = "qflow"
    plugin = "plugin"  # horizon_plugin_pytorch, where it is installed

    def __str__(self) -> str:
        return self.value


def require_plugin() -> None:
    """Raise ConfigError if no plugin is installed. Nothing of it is imported."""
    if find_spec("horizon_plugin_pytorch") is None:
        raise ConfigError(
            "engine=plugin needs horizon_plugin_pytorch, but got none installed here. Install it from OpenExplorer's "
            "packages, or tune with engine=qflow."
        )


def engine_name(text: object) -> EngineName:
    """Return the engine of this name. Raises ConfigError for another."""
    names = [name.value for name in EngineName]
    if text not in names:
        way_out = did_you_mean(str(text), names) or " Leave it out."
        raise ConfigError(f"engine is one of {', '.join(names)}, but got {text!r:.80}.{way_out}")
    return EngineName(text)
