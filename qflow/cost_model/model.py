"""The cost model of one march, a sum over operators: its parameters, and the time of one operator.

    T_op  = [tau*gemm + k_mac*(MAC/M + large*MAC/L + ATT/A) + k_soft*SOFT/S + k_vec*(LUT+CAST+FP16)/V + p*PASS] / f
            + bytes / B
    T_bpu = T0 + sum of T_op + float outputs / F;      latency (1 thread) = T_bpu + H + h * outputs

MAC counts padded channels and no depthwise convolutions: the measured rows do not determine their rate, so they cost
their GEMM call and their weights only. ATT are the MACs of the matmuls and SOFT the softmax elements of attention, LUT
the elements of SiLU, GELU, sigmoid and the like, FP16 those of any other element-wise operator that runs in fp16 on the
vector unit, PASS the elements that any other operator passes (resize, concat, add, layer norm, grid_sample, ...), whose
price p is a range (`element_prices`). `large` is a property of the network: the share of its MACs beyond
t = `large_gemm_gmac` per GEMM, max(0, 1 - t*GEMMs/MAC). Networks with large GEMMs run slower than their MACs, weights
and look-ups explain; that their tensors do not fit into the on-chip memory is an inference. The parameters are fitted
to published board measurements (fit.py). To T_op comes the time of conversions between int8 and int16 (`boundary_ms`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.limits import LARGEST, Above, AtLeast, check_limits
from qflow.cost_model.features import OpFeatures
from qflow.cost_model.work import PRICED, OpWork

Range = tuple[float, float, float]
"""Lowest, likely and highest value."""


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Parameters of one march; the defaults are those of nash-m, measured on S100P in its place."""

    march: str = "nash-m"
    clock_ghz: Annotated[float, Above(0.0)] = 1.5
    """Clock of the BPU in GHz (f)."""
    fixed_ms: Annotated[float, AtLeast(0.0)] = 0.0503
    """Time of a network without operators in ms (T0)."""
    gemm_us_ghz: Annotated[float, AtLeast(0.0)] = 1.58
    """Time of each GEMM call in us at 1 GHz (tau)."""
    gmac_per_ms_ghz: Annotated[float, Above(0.0)] = 20.2
    """Rate of convolutions and linear layers in GMAC/ms at 1 GHz (M)."""
    large_gemm_gmac: Annotated[float, AtLeast(0.0)] = 0.5
    """GMAC for each GEMM from which on a network counts as large (t)."""
    large_gmac_per_ms_ghz: Annotated[float, Above(0.0)] = 26
    """Further rate for the MACs of large networks in GMAC/ms at 1 GHz (L)."""
    attention_gmac_per_ms_ghz: Annotated[float, Above(0.0)] = 1.22
    """Rate of the matmuls of attention in GMAC/ms at 1 GHz (A)."""
    lut_melem_per_ms_ghz: Annotated[float, Above(0.0)] = 26.3
    """Rate of look-ups, casts and fp16 in million elements/ms at 1 GHz (V)."""
    softmax_melem_per_ms_ghz: Annotated[float, Above(0.0)] = 9.53
    """Rate of the softmax of attention in million elements/ms at 1 GHz (S)."""
    weight_mb_per_ms: Annotated[float, Above(0.0)] = 54
    """Bandwidth at which weights are read in MB/ms (B)."""
    host_ms: Annotated[float, AtLeast(0.0)] = 0.214
    """Time on the host for each frame in ms (H)."""
    host_output_ms: Annotated[float, AtLeast(0.0)] = 0.0121
    """Further time on the host for each output tensor in ms (h)."""
    host_interval: Sequence[float] = (0.914, 1.18)
    """Lowest and highest time on the host, relative to the predicted one."""
    interval: Sequence[float] = (0.904, 1.17)
    """Lowest and highest BPU time of an int8 network like the measured ones, relative to the predicted one."""
    short_interval: Sequence[float] = (0.849, 1.2)
    """The same for a network of less than `SHORT_MS` (predictions.py)."""
    float_melem_per_ms: Annotated[float, Above(0.0)] = 1.56
    """Rate at which the host converts float outputs in million elements/ms, the slower of two tool chains (F)."""
    host_dequantize: bool = False
    """True if float outputs are converted on the host; builds usually strip the dequantize nodes."""
    nominal_mac_per_cycle: Annotated[float, Above(0.0)] = 42700.0
    """Advertised int8 TOPS / 2 / clock, to which utilisation relates."""
    onchip_mb: float | None = None
    """On-chip memory for activations; its size is not published."""
    mac_factors: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "qint8/qint8": (1.0, 1.0, 1.0),
            "qint16/qint8": (1.8, 2.0, 2.9),
            "qint8/qint16": (1.8, 2.0, 2.9),
            "qint16/qint16": (2.0, 4.0, 4.0),
        }
    )
    """Input / weight dtype -> lowest, likely and highest cost of a MAC relative to int8."""
    vector_factors: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"qint8": (1.0, 1.0, 1.0), "qint16": (1.0, 2.0, 3.0), "float16": (4.0, 8.0, 16.0)}
    )
    """Dtype -> lowest, likely and highest cost of a look-up or cast relative to int8."""
    softmax_factors: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {"qint8": (1.0, 1.0, 1.0), "qint16": (1.0, 2.0, 2.0), "float16": (4.0, 8.0, 16.0)}
    )
    """Dtype -> lowest, likely and highest cost of a softmax relative to int8."""
    element_prices: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "elementwise": (0.0, 0.0, 0.03),
            "move": (0.0, 0.0, 0.0208),
            "pool": (0.0, 0.0, 0.025),
            "reduce": (0.0, 0.0, 0.0361),
            "resize": (0.02, 0.099, 0.15),
            "layer_norm": (0.0, 0.07, 0.175),
            "grid_sample": (0.099, 0.2, 0.36),
            "order": (0.1, 0.36, 1.0),
        }
    )
    """Kind of operator without a rate -> lowest, likely, highest time of 10^6 int8 elements in ms at 1 GHz (p).

    Where they come from: docs/cost-model.md, "Operators with a range".
    """
    boundary_ms: Sequence[float] = (0.0, 0.0254, 0.64)
    """Lowest, likely, highest time in ms for 10^6 elements that pass from int8 to int16 or back.

    They are free in the output stage of an operator, take one pass of the vector unit (1 / (V f)), or the host makes
    them (1 / F). Why the middle one is the likely one: docs/cost-model.md, "Boundaries between int8 and int16".
    """
    provenance: str = ""
    """What the parameters were fitted to, and their errors on rows that were left out."""

    def __post_init__(self) -> None:
        """Raise ConfigError for rates that are not positive, amounts below 0, and factors that are no range."""
        check_limits(self, "cost")
        if self.onchip_mb is not None and not 0.0 < self.onchip_mb <= LARGEST:
            raise ConfigError(f"cost.onchip_mb is a number above 0, or null for unknown, but got {self.onchip_mb:g}.")
        for name in ("mac_factors", "vector_factors", "softmax_factors"):
            table = getattr(self, name)
            object.__setattr__(self, name, {key: _range(value, f"cost.{name}.{key}") for key, value in table.items()})
        for name in ("host_interval", "interval", "short_interval"):
            object.__setattr__(self, name, _ends(getattr(self, name), f"cost.{name}"))
        prices = {k: _range(v, f"cost.element_prices.{k}", least=0.0) for k, v in self.element_prices.items()}
        if missing := set(PRICED.values()) - set(prices):
            raise ConfigError(
                f"cost.element_prices has a price for {', '.join(sorted(set(PRICED.values())))}, but got none for "
                f"{', '.join(sorted(missing))}. Start from a shipped device: defaults: [nash-m, _self_]."
            )
        object.__setattr__(self, "element_prices", prices)
        object.__setattr__(self, "boundary_ms", _range(self.boundary_ms, "cost.boundary_ms", least=0.0))

    def large_share(self, works: Sequence[OpWork]) -> float:
        """Share of a network's MACs beyond `large_gemm_gmac` per GEMM."""
        gemms, gmacs = sum(w.gemm for w in works), sum(w.padded_macs for w in works) * 1e-9
        return max(0.0, 1.0 - self.large_gemm_gmac * gemms / gmacs) if gmacs else 0.0

    def compute_ms(self, row: OpFeatures, large: float) -> Range:
        """Time of one operator without its weights, by the lowest, likely and highest factors of its dtypes.

        Raises ConfigError for a dtype (pair) that has no factor.
        """
        work, weight = row.work, (row.weight_dtype or QDtype.qint8).value
        fixed = self.gemm_us_ghz * 1e-3 * work.gemm
        mac = work.padded_macs * 1e-9 * (1.0 / self.gmac_per_ms_ghz + large / self.large_gmac_per_ms_ghz)
        mac += work.attention_macs * 1e-9 / self.attention_gmac_per_ms_ghz
        elements = work.lut + row.cast
        if row.input_dtype == QDtype.float16 and work.priced in VECTOR:
            elements += work.passed
        vector = elements * 1e-6 / self.lut_melem_per_ms_ghz
        soft = work.softmax * 1e-6 / self.softmax_melem_per_ms_ghz
        parts = [
            (mac, self.mac_factors, f"{row.input_dtype.value}/{weight}"),
            (vector, self.vector_factors, row.input_dtype.value),
            (soft, self.softmax_factors, row.input_dtype.value),
        ]
        total = [fixed, fixed, fixed]
        for amount, table, key in parts:
            if amount:
                total = [t + amount * k for t, k in zip(total, _factor(table, key, row), strict=True)]
        if work.priced:
            amount = work.passed * 1e-6 * _width(row)
            total = [t + amount * p for t, p in zip(total, self.element_prices[work.priced], strict=True)]
        low, likely, high = (t / self.clock_ghz for t in total)
        return low, likely, high

    def stream_ms(self, row: OpFeatures) -> float:
        """Time to read the operator's weights."""
        return row.weight_bytes * 1e-6 / self.weight_mb_per_ms

    def conversion_ms(self, row: OpFeatures) -> Range:
        """Time of the conversions between int8 and int16 at an operator; the likely one without that of its casts,
        which `compute_ms` contains.
        """
        if not row.boundary:
            return NOTHING
        low, likely, high = self.boundary_ms
        return low * row.boundary * 1e-6, likely * (row.boundary - row.cast) * 1e-6, high * row.boundary * 1e-6


NOTHING = (0.0, 0.0, 0.0)
VECTOR = ("elementwise", "layer_norm", "reduce")
"""Keys of `element_prices` that the vector unit computes."""


def _width(row: OpFeatures) -> float:
    """How often an element counts: twice in 16 bits, since a unit takes half as many of them at once.

    The values inside a layer norm are 16 bits wide whatever its dtype is, and what the vector unit computes in fp16 has
    a price of its own.
    """
    work = row.work
    if row.input_dtype == QDtype.float16 and work.priced in VECTOR:
        return 0.0
    return 1.0 if work.layer_norm else row.input_dtype.bits / 8


def _range(value: Sequence[float] | float, where: str, least: float | None = None) -> Range:
    """A factor as a range; a single number stands for itself. Raises ConfigError.

    Each number is above 0, or at least `least` if this is given.
    """
    try:
        given = [float(value)] * 3 if isinstance(value, (int, float, str)) else [float(v) for v in value]
    except (TypeError, ValueError):
        given = []
    allowed = len(given) == 3 and (given[0] > 0.0 if least is None else given[0] >= least)
    if not allowed or not given[0] <= given[1] <= given[2] <= LARGEST:
        rule = "above 0" if least is None else f"of at least {least:g}"
        raise ConfigError(f"{where} is a number {rule} or [lowest, likely, highest], but got {value}.")
    return given[0], given[1], given[2]


def _ends(value: Sequence[float], where: str) -> tuple[float, float]:
    """An interval relative to its middle, which is 1. Raises ConfigError."""
    try:
        low, high = map(float, value)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not 0.0 < low <= 1.0 <= high <= LARGEST:
        raise ConfigError(f"{where} is [lowest, highest] around 1, above 0, but got {value}.")
    return low, high


def _factor(table: Mapping[str, Sequence[float]], key: str, row: OpFeatures) -> Sequence[float]:
    if key not in table:
        raise ConfigError(
            f"The device file prices {', '.join(table)}, but got {key} for {row.work.name}. Add a factor."
        )
    return table[key]
