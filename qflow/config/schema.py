"""What each group of a configuration may hold: every key with its type (command_schema.py: the whole of a command).

The classes are keyword-only and not frozen, as Hydra needs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from qflow.core.limits import Above, AtLeast, Between, OneOf


@dataclass(kw_only=True)
class TaskSchema:
    """What is tuned. Either one `_target_` that gives a Task, or model, data and metric apart."""

    name: str = MISSING
    """Name of the task, by which its results, experiment and registered model are called."""
    _target_: str | None = None
    """Function or class that returns a whole Task; null builds it from model, data and metric."""
    model: dict[str, Any] = field(default_factory=dict)
    """`_target_` that returns the float model, and its arguments."""
    data: dict[str, Any] = field(default_factory=dict)
    """`_target_` that returns the data, and its arguments."""
    metric: dict[str, Any] = field(default_factory=dict)
    """`_target_` of the metric, and its arguments."""
    float_metric: Annotated[float, Between(-1e9, 1e9)] | None = None
    """What the float model must reach on the evaluation data; null takes what is measured."""
    tolerance: Annotated[float, Between(0.0, 1e9)] = 0.002
    """How far the measured float metric may lie below or above `float_metric`."""
    deploy_shape: Any = None
    """Shape at which cost is computed: one list, or a mapping for named inputs; null takes one evaluated sample."""
    batch_size: Annotated[int, Between(1, 1_000_000)] = 32
    """Evaluation batch size."""
    cached_attrs: list[str] = field(default_factory=list)
    """Attributes in which the model keeps state from frame to frame; the data are then sequences."""


@dataclass(kw_only=True)
class MetricSchema:
    """By what a task is judged: its own metric, or agreement with the float model."""

    _target_: str | None = None
    """Class of the metric; null takes that of the task."""
    by: str = ""
    """Of agreement: top1, pixels or cosine."""
    outputs: list[str] = field(default_factory=list)
    """Of agreement: names of the outputs to compare; empty takes all of floating point."""


@dataclass(kw_only=True)
class RulesSchema:
    """Fields of qflow.core.device_rules.DeviceRules."""

    int8_inputs: dict[str, list[Annotated[int, Between(0, 99)]]] = field(default_factory=dict)
    int8_outputs: list[str] = field(default_factory=list)
    fused_add_int8: bool = True
    dual_int16: bool = False
    dual_int16_ops: list[str] = field(default_factory=lambda: ["conv2d", "linear"])
    dual_high_precision: bool = False
    matmul_int16_inputs: Annotated[int, Between(0, 2)] = 1
    float16_kinds: list[str] = field(default_factory=list)
    inner_int16: list[str] = field(default_factory=list)
    attention_int8: bool = True


@dataclass(kw_only=True)
class CostSchema:
    """Fields of qflow.cost_model.model.CostModel."""

    clock_ghz: float = MISSING
    fixed_ms: float = MISSING
    gemm_us_ghz: float = MISSING
    gmac_per_ms_ghz: float = MISSING
    large_gemm_gmac: float = MISSING
    large_gmac_per_ms_ghz: float = MISSING
    attention_gmac_per_ms_ghz: float = MISSING
    lut_melem_per_ms_ghz: float = MISSING
    softmax_melem_per_ms_ghz: float = MISSING
    weight_mb_per_ms: float = MISSING
    host_ms: float = MISSING
    host_output_ms: float = MISSING
    host_interval: list[float] = MISSING
    interval: list[float] = MISSING
    short_interval: list[float] = MISSING
    float_melem_per_ms: float = MISSING
    host_dequantize: bool = False
    nominal_mac_per_cycle: float = MISSING
    onchip_mb: Annotated[float, Above(0.0)] | None = None
    mac_factors: dict[str, Any] = field(default_factory=dict)
    vector_factors: dict[str, Any] = field(default_factory=dict)
    softmax_factors: dict[str, Any] = field(default_factory=dict)
    element_prices: dict[str, Any] = field(default_factory=dict)
    boundary_ms: Any = MISSING
    provenance: str = ""


@dataclass(kw_only=True)
class DeviceSchema:
    """A march: what it allows and what it costs."""

    march: str = MISSING
    """The march: nash-e (Journey 6E) or nash-m (Journey 6M); set by device=<name>."""
    oe_version: str = MISSING
    """OpenExplorer release whose rules hold."""
    rules: RulesSchema = field(default_factory=RulesSchema)
    cost: CostSchema = field(default_factory=CostSchema)
    profile: str | None = None
    """A measured report of this model: hbm_perf, hb_analyzer or hrt_model_exec."""
    profile_dtype: Annotated[str, OneOf(("qint8", "qint16", "float16"))] = "qint8"
    """Template that the measured model was built with."""


@dataclass(kw_only=True)
class CalibrationSchema:
    """Fields of qflow.core.settings.CalibrationSettings."""

    method: str = "mse"
    batch_size: int = 16
    steps: int = 16
    augment: bool = False
    percentile: float = 99.99
    averaging_constant: float | None = None
    int16_margin: float = 1.25
    divisor: str = "guide"
    float16_clip: bool = False
    clip_min: float = -1.0
    clip_max: float = 1.0
    std_scale: float = 3.0
    sampling: int = 7


@dataclass(kw_only=True)
class QConfigSchema:
    """Fields of qflow.core.settings.QConfigSettings."""

    template: str = "qint8"
    int16_ratio: float = 0.0
    float16_count: int = 0
    assignment: str = ""
    error_share: float | None = None
    modules: dict[str, Any] = field(default_factory=dict)
    sensitive_type: str = "activation"
    counting: str = "operators"
    ranking: str = "score"
    rules: list[str] = field(default_factory=list)
    propagate_ranges: bool = True


@dataclass(kw_only=True)
class QuantSchema:
    """How the model is prepared."""

    skip: list[str] = field(default_factory=list)
    """Modules, by name or class name, that stay in float."""
    fold_functional_norms: bool = False
    """Fold F.batch_norm on a module's own statistics as an nn.BatchNorm2d; the plugin goes by module type."""
    split_shared: Any = "report"
    """Modules whose calls get a quantizer each: report (none), auto (all without parameters and buffers), or names."""


@dataclass(kw_only=True)
class SensitivitySchema:
    """Fields of qflow.core.settings.SensitivitySettings."""

    metric: str = "L1"
    compare: str = "fair"
    own_metric: dict[str, str] = field(default_factory=lambda: {"_target_": "", "order": ""})
    bad_cases: int = 16
    search_samples: int = 256
    method: str = "exact"
    screened_share: float = 0.4
    draws: int = 64
    dtypes: list[str] = field(default_factory=lambda: ["qint8"])
    memory_mb: int = 2048
    seed: int = 0


@dataclass(kw_only=True)
class TeacherSchema:
    """Fields of qflow.core.qat_settings.TeacherSettings."""

    weight: float = 0.0
    features: list[str] = field(default_factory=list)
    temperature: float = 0.0


@dataclass(kw_only=True)
class QatSchema:
    """Fields of qflow.core.qat_settings.QatSettings."""

    steps: int = 0
    apply: str = "every_trial"
    batch_size: int = 64
    augment: bool = False
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    rates: dict[str, float] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=lambda: {"_target_": "torch.optim.AdamW"})
    scheduler: dict[str, Any] = field(default_factory=dict)
    cosine_decay: bool = False
    scheduled: bool = True
    mode: str = "fuse_bn"
    moving: bool = True
    moving_weights: bool = True
    averaging_constant: float = 0.01
    freeze: list[str] = field(default_factory=list)
    float_steps: int | None = None
    max_share: float = 0.2
    clip_gradients: float | None = None
    divergence: float = 10.0
    first_losses: int = 5
    checkpoint_every: int = 0
    learned_scales: float = 0.0
    teacher: TeacherSchema = field(default_factory=TeacherSchema)
    ema: float = 0.0
    dampening: float = 0.0
    amp: bool = False
    seed: int = 0


@dataclass(kw_only=True)
class ObjectiveSchema:
    """The accuracy goal, and what is optimized."""

    optimize: dict[str, Annotated[str, OneOf(("maximize", "minimize"))]] = field(default_factory=dict)
    """Run metric -> maximize or minimize, in order; empty for the task's metric and the least cost/latency_ms."""
    max_drop: Annotated[float, AtLeast(0.0)] = 0.01
    """Largest loss against float, in the metric's own units."""
    max_latency_ms: Annotated[float, AtLeast(0.0)] | None = None
    """Budget for the predicted latency of one thread; null sets none, as with the next three."""
    max_slowdown: Annotated[float, AtLeast(1.0)] | None = None
    """Budget for the predicted latency over that with every operator at int8: 1.1 allows a tenth more."""
    max_int16_mac_share: Annotated[float, Between(0.0, 1.0)] | None = None
    """Budget for the share of MACs with an int16 side."""
    max_traffic_mb: Annotated[float, AtLeast(0.0)] | None = None
    """Budget for the DDR traffic of a frame, in 10^6 bytes."""


@dataclass(kw_only=True)
class SecuritySchema:
    """Whose code a stored trial may name."""

    allow: list[str] = field(default_factory=list)
    """Packages beside the built-in tasks, or whole names: [my] allows my.build_model and my.data.Data."""
