"""Settings of a trial: what a search may vary, checked when built, with the way out in every message."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError

METHODS = ("minmax", "percentile", "mse", "kl", "mix")
COMPARISONS = ("Cosine", "MSE", "L1", "KL", "SQNR", "Atol")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How many data calibrate, and how scales follow from the statistics (formulas: quant/observer.py)."""

    method: str = "mse"
    batch_size: int = 16
    steps: int = 16
    percentile: float = 99.99
    averaging_constant: float | None = None
    """Moving average of batch maxima for minmax (the plugin's 0.01); null takes the largest value of all."""
    int16_margin: float = 1.25
    divisor: str = "guide"

    def __post_init__(self) -> None:
        _one_of("calibration.method", self.method, METHODS)
        _one_of("calibration.divisor", self.divisor, ("guide", "plugin"))
        _within("calibration.batch_size", self.batch_size, 1, 4096)
        _within("calibration.steps", self.steps, 1, 100_000)
        _within("calibration.percentile", self.percentile, 50.0, 100.0)
        _within("calibration.int16_margin", self.int16_margin, 1.0, 8.0)
        if self.averaging_constant is not None:
            _within("calibration.averaging_constant", self.averaging_constant, 1e-6, 1.0)


@dataclass(frozen=True, kw_only=True)
class QConfigSettings:
    """Which operators get which precision: names first, then the sensitive share, then the template."""

    template: str = "qint8"
    int16_ratio: float = 0.0
    modules: Mapping[str, str] = field(default_factory=dict)
    """Operator or module name -> `qint16`, with the weight `qint8/qint16`, or a fixed scale `qint8@0.05`; wins."""

    def __post_init__(self) -> None:
        _one_of("qconfig.template", self.template, ("qint8", "qint16"))
        _within("qconfig.int16_ratio", self.int16_ratio, 0.0, 1.0)
        known = tuple(d.value for d in QDtype)
        for name, value in self.modules.items():
            for part in str(value).split("/"):
                _one_of(f"qconfig.modules.{name}", part.partition("@")[0], known)


@dataclass(frozen=True, kw_only=True)
class SensitivitySettings:
    """Which samples are bad cases, and how outputs are compared."""

    metric: str = "L1"
    bad_cases: int = 16
    search_samples: int = 256
    """How many calibration samples are searched for bad cases."""

    def __post_init__(self) -> None:
        _one_of("sensitivity.metric", self.metric, COMPARISONS)
        _within("sensitivity.bad_cases", self.bad_cases, 1, 4096)
        _within("sensitivity.search_samples", self.search_samples, 1, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """Everything that one trial may vary."""

    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    qconfig: QConfigSettings = field(default_factory=QConfigSettings)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is one of {', '.join(allowed)}, but got {value!r}.")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # NaN fails too
        raise ConfigError(f"{name} lies between {low:g} and {high:g}, but got {value:g}.")
