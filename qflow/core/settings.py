"""The settings of a trial, which a search may vary. Illegal values raise ConfigError when the record is built."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from qflow.core.errors import ConfigError
from qflow.core.limits import LARGEST, LARGEST_SEED, Between, OneOf, check_limits
from qflow.core.limits import one_of as _one_of
from qflow.core.op_spec import parse_op
from qflow.core.qat_settings import NORM_MODES as NORM_MODES
from qflow.core.qat_settings import QatSettings as QatSettings
from qflow.core.qat_settings import TeacherSettings as TeacherSettings
from qflow.core.qconfig import METHODS
from qflow.core.repair_settings import RepairSettings

RULES = ("gemm_int8", "gemm_to_layer_norm_int16", "gemm_to_softmax_int16", "gemm_to_grid_int16")
SENSITIVITY_METHODS = ("exact", "screened", "estimate", "point")
COMPARISONS = ("Cosine", "MSE", "L1", "KL", "SQNR", "Atol")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """The amount of calibration data, and how scales follow from statistics (formulas: quant/values/observer.py)."""

    method: Annotated[str, OneOf(METHODS)] = "mse"
    """Rule for int8 thresholds: minmax, percentile, mse, kl, mix, clip or clip_std."""
    batch_size: Annotated[int, Between(1, 4096)] = 16
    """Samples in a calibration batch."""
    steps: Annotated[int, Between(1, 100_000)] = 16
    """Calibration batches; the guide asks for 10 to 100."""
    augment: bool = False
    """Read `task.data.calibration_augmented` (with flips, for example) in place of `calibration`."""
    percentile: Annotated[float, Between(50.0, 100.0)] = 99.99
    """Method percentile: share of the magnitudes, in percent, that is not clipped."""
    averaging_constant: Annotated[float, Between(1e-6, 1.0)] | None = None
    """Constant of a moving average of the batches' thresholds (the plugin's 0.01); null takes all values at once."""
    int16_margin: Annotated[float, Between(1.0, 8.0)] = 1.25
    """Factor on the largest magnitude that gives an int16 threshold."""
    divisor: Annotated[str, OneOf(("guide", "plugin"))] = "guide"
    """What a threshold is divided by: `guide` 128 (int16: 32768), `plugin` 127.5 (32767.5)."""
    clip_min: Annotated[float, Between(-LARGEST, LARGEST)] = -1.0
    """Method clip: values are clipped to clip_min..clip_max."""
    clip_max: Annotated[float, Between(-LARGEST, LARGEST)] = 1.0
    """Method clip: see clip_min."""
    std_scale: Annotated[float, Between(0.1, 100.0)] = 3.0
    """Method clip_std: values are clipped to so many standard deviations around the mean."""
    sampling: Annotated[int, Between(1, 1024)] = 7
    """Every n-th value enters the histogram; 1 takes all. Minimum and maximum are always exact."""
    float16_clip: bool = False
    """fp16 results beyond 65504 are clipped; otherwise they overflow to infinity, and are counted."""

    def __post_init__(self) -> None:
        check_limits(self, "calibration")
        if not -math.inf < self.clip_min < self.clip_max < math.inf:
            raise ConfigError(
                f"calibration.clip_min lies below clip_max, both finite, but got {self.clip_min:g} and "
                f"{self.clip_max:g}."
            )


@dataclass(frozen=True, kw_only=True)
class QConfigSettings:
    """The choice of precisions: operators by name first, then the most sensitive ones, templates, and the rest."""

    template: Annotated[str, OneOf(("qint8", "qint16"))] = "qint8"
    """Output dtype of every operator that no other rule decides."""
    int16_ratio: Annotated[float, Between(0.0, 1.0)] = 0.0
    """Share of the operators that can be int16 (without those in fp16) to promote, the most sensitive first."""
    float16_count: Annotated[int, Between(0, 100_000)] = 0
    """Number of operators of the vector unit that get fp16: those whose error falls most from int16 to fp16."""
    assignment: str = ""
    """Instead of a ratio: one letter for each operator that can be int16, in graph order; 8 is int8, 6 is int16. With
    sensitive_type=both one letter for each weight may follow."""
    error_share: Annotated[float, Between(0.0, 1.0)] | None = None
    """Instead of a ratio: the cheapest mix that leaves at most this share of the error that int16 can remove."""
    modules: Mapping[str, Any] = field(default_factory=dict)
    """Operator or module name -> its precision; it overrides all other rules. The forms (core/op_spec.py):
    `qint16`, `qint8/qint16` with the weight, a fixed scale `qint8@0.05`, a known range `qint16@0..200`, a mapping."""
    sensitive_type: Annotated[str, OneOf(("activation", "weight", "both"))] = "activation"
    """What is promoted: `activation` (outputs), `weight` or `both`, ranked together. With `both`, of a weight and its
    input, which the device takes at int16 only one at a time, the more sensitive one is promoted."""
    counting: Annotated[str, OneOf(("operators", "rows"))] = "operators"
    """Units that the ratio counts: `operators` that can be promoted, or `rows` of the table as in the plugin."""
    ranking: Annotated[str, OneOf(("score", "score_per_ms"))] = "score"
    """Order of promotion by the ratio: by sensitivity (`score`), or by sensitivity per ms of int16 (`score_per_ms`)."""
    rules: Sequence[Annotated[str, OneOf(RULES)]] = field(default_factory=list)
    """Templates before the last one (core/template.py): `gemm_to_grid_int16`, `gemm_to_softmax_int16`, ..."""
    propagate_ranges: bool = True
    """Propagate known ranges to every operator whose range follows from them (core/known_range.py)."""

    def __post_init__(self) -> None:
        check_limits(self, "qconfig")
        if strange := set(self.assignment) - set("86"):
            raise ConfigError(f"qconfig.assignment is made of 8 (int8) and 6 (int16), but got {min(strange)!r} in it.")
        if (self.int16_ratio > 0) + bool(self.assignment) + (self.error_share is not None) > 1:
            raise ConfigError(
                "One rule says which operators are int16, but got two of qconfig.int16_ratio, assignment and "
                "error_share. Leave one; a searched one goes by search.space.qconfig.int16_ratio=null."
            )
        if self.ranking != "score" and (self.sensitive_type == "weight" or self.counting == "rows"):
            raise ConfigError(
                f"qconfig.ranking=score_per_ms counts operators by activation, but got {self.sensitive_type} counted "
                f"by {self.counting}. Use qconfig.ranking=score."
            )
        for name, value in self.modules.items():
            parse_op(value, f"qconfig.modules.{name}")

    @property
    def needs_ranking(self) -> bool:
        """Whether the settings choose operators by their sensitivities."""
        chosen = self.assignment or self.error_share is not None or self.float16_count
        return bool(chosen) or 0.0 < self.int16_ratio < 1.0


@dataclass(frozen=True, kw_only=True)
class SensitivitySettings:
    """The choice of bad cases, and the comparison of outputs."""

    metric: Annotated[str, OneOf(COMPARISONS)] = "L1"
    """Comparison of quantized with float outputs: Cosine, MSE, L1, KL, SQNR or Atol."""
    compare: Annotated[str, OneOf(("fair", "raw"))] = "fair"
    """How several outputs count for bad cases: `fair`, each over its mean; `raw`, the worst number (plugin)."""
    own_metric: Mapping[str, str] = field(default_factory=lambda: {"_target_": "", "order": ""})
    """The user's own metric for bad cases: `_target_`, and its `order` from bad to good, `ascending` or `descending`.
    It is a function of one float and one quantized output `[1, ...]` that returns a number."""
    bad_cases: Annotated[int, Between(1, 4096)] = 16
    """How many of the worst samples sensitivities are measured on."""
    search_samples: Annotated[int, Between(1, 1_000_000)] = 256
    """How many calibration samples are searched for bad cases."""
    method: Annotated[str, OneOf(SENSITIVITY_METHODS)] = "exact"
    """exact, screened (estimated, the top fifth measured), estimate, or point (with all other quantizers on).

    point gives what the outputs gain without each quantizer while all others stay on, to first order."""
    screened_share: Annotated[float, Between(0.01, 1.0)] = 0.4
    """Largest share of the rows that screening measures."""
    draws: Annotated[int, Between(1, 65536)] = 64
    """Random directions x samples over which an estimate is averaged; fewer lose a third of the top rows."""
    dtypes: Sequence[Annotated[str, OneOf(("qint8", "qint16", "float16"))]] = field(default_factory=lambda: ["qint8"])
    """Candidate dtypes of the rows: qint8, qint16, float16."""
    memory_mb: Annotated[int, Between(1, 10_000_000)] = 2048
    """Memory for float values and variants; if it is short, samples are run in parts, then values recomputed."""
    seed: Annotated[int, Between(0, LARGEST_SEED)] = 0
    """Seed of the random directions of an estimate."""

    def __post_init__(self) -> None:
        check_limits(self, "sensitivity")
        if self.own_metric["_target_"]:
            _one_of("sensitivity.own_metric.order", self.own_metric["order"], ("ascending", "descending"))
        if not self.dtypes:
            raise ConfigError("sensitivity.dtypes names at least one dtype, but got none. Write [qint8].")


@dataclass(frozen=True, kw_only=True)
class TrialSettings:
    """All settings that a trial may vary."""

    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    qconfig: QConfigSettings = field(default_factory=QConfigSettings)
    qat: QatSettings = field(default_factory=QatSettings)
    repair: RepairSettings = field(default_factory=RepairSettings)
