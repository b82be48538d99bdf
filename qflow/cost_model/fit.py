"""Fits the parameters of the cost model to networks whose time was measured, and validates the predictions.

The fit is a relative non-negative least squares: it minimizes the sum over rows of (predicted / measured - 1)^2, with
no coefficient below 0. Clocks and the price of resizes are given; T0 and B do not scale with the clock. The rows hardly
contain attention, so its two coefficients have a prior c0, which adds (strength * (c / c0 - 1))^2. No other coefficient
has one, and the prior comes from a network that is not among the rows. The kink (the GMAC per GEMM from which large
GEMMs cost more) is the one of `KINKS` with the least squared errors when families are left out of the rows of the fit.

The validation is blind: it leaves out whole families, then single networks, and predicts each march from the rows of
the others. All that decides a prediction and its interval (coefficients, kink, host times, residuals) comes from the
other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qflow.core.errors import ConfigError
from qflow.core.record import digest
from qflow.cost_model.host import Host, fit_hosts
from qflow.cost_model.model import CostModel
from qflow.cost_model.networks import CLOCKS, COLUMNS, Network
from qflow.cost_model.predictions import Bands, Errors, Prediction, bands_of, errors_of

Array = NDArray[np.float64]
STRENGTH = 1.0
"""Strength of the prior, for residuals of about 0.07 per row: the two coefficients are expected within 7 % of it."""
NEVER = 1e9
"""A kink in GMAC beyond any network: no surcharge."""
KINKS = (0.3, 0.4, 0.5, 0.6, 0.8, NEVER)
NAMES = (
    *("fixed", "gemms", "gmacs", "large_gmacs", "attention_gmacs", "softmax_melem"),
    *("lut_melem", "weight_mb"),
)
# ms * GHz per unit. DINOv2 ViT-S was measured all in int16 on both boards: with factor 2, and without what the
# int8 rows and a layer norm explain, attention takes 0.89 ms * GHz there on nash-e and 1.15 on nash-m. Half of the
# average goes to its 0.609 GMAC of matmuls, half to its 4.76 million elements of softmax.
PRIOR = {"attention_gmacs": 0.835, "softmax_melem": 0.107}
RESIZE = CostModel().element_prices["resize"][1]


@dataclass(frozen=True)
class Fit:
    """Coefficients by `NAMES`, the time on the host by march, the intervals, and the validation of the fit."""

    coefficients: Mapping[str, float]
    kink: float
    hosts: Mapping[str, Host]
    bands: Bands
    families: Sequence[str] = ()
    rows: int = 0
    data: str = ""
    """Digest of the rows."""
    left_out: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)
    """`family`, `network`, and `<march> from the others` -> predictions of the BPU's time."""
    latencies: Mapping[str, Sequence[Prediction]] = field(default_factory=dict)
    """The same for the latency of one thread, where it was measured."""

    def errors(self, how: str) -> Errors:
        """Errors of one kind of validation, a key of `left_out`."""
        return errors_of(self.left_out[how])

    def apply(self, model: CostModel) -> CostModel:
        """`model` with the fitted parameters and their provenance."""
        c = self.coefficients
        host = self.hosts.get(model.march)
        found = replace(
            model,
            fixed_ms=_round(c["fixed"]),
            gemm_us_ghz=_round(1e3 * c["gemms"]),
            large_gemm_gmac=self.kink,
            interval=tuple(map(_round, self.bands.longer)),
            short_interval=tuple(map(_round, self.bands.short)),
            provenance=self.provenance(),
            **{field: _inverse(c[name]) for name, field in RATE_OF.items()},  # type: ignore[arg-type]
        )
        if host is None:
            return found
        times = {"host_ms": _round(host.fixed_ms), "host_output_ms": _round(host.output_ms)}
        return replace(found, **times, host_interval=tuple(map(_round, host.band)))  # type: ignore[arg-type]

    def provenance(self) -> str:
        """One line for the device file."""
        found = "; ".join(
            f"{how} left out: {self.errors(how)}" for how in ("family", "network") if how in self.left_out
        )
        return f"fitted to {self.rows} times of {', '.join(self.families)} (data {self.data}); {found}"


RATE_OF = {
    "gmacs": "gmac_per_ms_ghz",
    "large_gmacs": "large_gmac_per_ms_ghz",
    "attention_gmacs": "attention_gmac_per_ms_ghz",
    "softmax_melem": "softmax_melem_per_ms_ghz",
    "lut_melem": "lut_melem_per_ms_ghz",
    "weight_mb": "weight_mb_per_ms",
}
FREE = 1e9  # a rate that costs nothing


def _round(value: float) -> float:
    return float(f"{value:.5g}")


def _inverse(coefficient: float) -> float:
    return _round(1.0 / coefficient) if coefficient > 1.0 / FREE else FREE


# ---- least squares


@dataclass(frozen=True)
class _Rows:
    """Pairs of a network and a march on which it was measured."""

    pairs: Sequence[tuple[Network, str]]

    @staticmethod
    def of(networks: Sequence[Network]) -> _Rows:
        return _Rows([(n, march) for n in networks if n.dtype == "int8" for march in n.times])

    @property
    def times(self) -> Array:
        return np.array([n.times[march] for n, march in self.pairs])

    @property
    def families(self) -> list[str]:
        return [n.family for n, _ in self.pairs]

    @property
    def names(self) -> list[str]:
        return [n.name for n, _ in self.pairs]

    @property
    def marches(self) -> list[str]:
        return [march for _, march in self.pairs]

    def only(self, kept: NDArray[np.bool_]) -> _Rows:
        return _Rows([pair for pair, keep in zip(self.pairs, kept, strict=True) if keep])

    def networks(self) -> list[Network]:
        """The networks with the times and latencies of these rows alone."""
        marches: dict[str, set[str]] = {}
        for n, march in self.pairs:
            marches.setdefault(n.name, set()).add(march)
        unique = {n.name: n for n, _ in self.pairs}
        return [
            replace(n, **{name: {m: t for m, t in getattr(n, name).items() if m in marches[n.name]} for name in _TIMES})  # type: ignore[arg-type]
            for n in unique.values()
        ]

    def design(self, kink: float) -> Array:
        """One row for each pair, in the order of `NAMES`; ms per coefficient."""
        found = []
        for n, march in self.pairs:
            work = {**{name: getattr(n, name) for name in COLUMNS}, "fixed": 1.0}
            work["large_gmacs"] = max(0.0, n.gmacs - kink * n.gemms)
            found.append([work[name] / (1.0 if name in ("fixed", "weight_mb") else CLOCKS[march]) for name in NAMES])
        return np.array(found, dtype=float).reshape(-1, len(NAMES))

    def resizes(self) -> Array:
        """The given part of each time: that of resizes, in ms."""
        return np.array([RESIZE * n.resize_melem / CLOCKS[march] for n, march in self.pairs])


_TIMES = ("times", "latencies")


def _solve(design: Array, given: Array, times: Array, strength: float) -> Array:
    from scipy.optimize import nnls

    rows = [design / times[:, None]]
    aims = [1.0 - given / times]
    for name, prior in PRIOR.items() if strength else ():
        rows.append(np.array([[strength / prior if n == name else 0.0 for n in NAMES]]))
        aims.append(np.array([strength]))
    a = np.vstack(rows)
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    solution: Array = nnls(a / scale, np.concatenate(aims))[0] / scale
    return solution


def _left_out(rows: _Rows, groups: Sequence[str], strength: float, kink: float) -> Array:
    """Times predicted without the group of each row."""
    design, given, times, labels = rows.design(kink), rows.resizes(), rows.times, np.array(groups)
    found = np.zeros(len(times))
    for group in sorted(set(groups)):
        test = labels == group
        found[test] = given[test] + design[test] @ _solve(design[~test], given[~test], times[~test], strength)
    return found


def _fitted(rows: _Rows, strength: float, kink: float | None) -> Fit:
    """The fit of `rows` without a validation: the kink (unless given) and the intervals by left-out families."""
    groups = rows.families if len(set(rows.families)) > 1 else rows.names
    groups = groups if len(set(groups)) > 1 else rows.marches
    candidates = KINKS if kink is None else (kink,)
    found = {k: _left_out(rows, groups, strength, k) for k in candidates}
    best = min(candidates, key=lambda k: float(np.sum((found[k] / rows.times - 1.0) ** 2)))
    design = rows.design(best)
    solved = _solve(design, rows.resizes(), rows.times, strength)
    predicted = np.maximum(found[best], 1e-9)
    return Fit(
        coefficients=dict(zip(NAMES, map(float, solved), strict=True)),
        kink=best,
        hosts=fit_hosts(rows.networks()),
        bands=bands_of([float(p) for p in predicted], [float(r) for r in rows.times / predicted]),
    )


def fit_networks(networks: Sequence[Network], strength: float = STRENGTH, kink: float | None = None) -> Fit:
    """Fit the int8 rows of `networks` and validate. Raises ConfigError for fewer than ten times.

    A `kink` replaces the choice among `KINKS`.
    """
    rows = _Rows.of(networks)
    if len(rows.pairs) < 10:
        raise ConfigError(f"A fit needs at least ten int8 times, but got {len(rows.pairs)}. Add networks.")
    splits: dict[str, tuple[Sequence[str], Sequence[str]]] = {}
    if len(set(rows.families)) > 1:
        splits["family"] = rows.families, sorted(set(rows.families))
    if len(set(rows.names)) > 1:
        splits["network"] = rows.names, sorted(set(rows.names))
    for march in sorted(set(rows.marches)) if len(set(rows.marches)) > 1 else ():
        splits[f"{march} from the others"] = rows.marches, [march]
    times, latencies = {}, {}
    for how, (labels, groups) in splits.items():
        found = [pair for group in groups for pair in _predictions(rows, np.array(labels) == group, strength, kink)]
        times[how] = [bpu for bpu, _ in found]
        latencies[how] = [latency for _, latency in found if latency is not None]
    return replace(
        _fitted(rows, strength, kink),
        families=tuple(sorted(set(rows.families))),
        rows=len(rows.pairs),
        data=digest([[n.name, march, float(n.times[march])] for n, march in rows.pairs]),
        left_out=times,
        latencies=latencies,
    )


def _predictions(
    rows: _Rows, test: NDArray[np.bool_], strength: float, kink: float | None
) -> list[tuple[Prediction, Prediction | None]]:
    """Of each row of `test`, its BPU time and its latency (None if not measured), by a fit of the other rows."""
    held, fit = rows.only(test), _fitted(rows.only(~test), strength, kink)
    predicted = held.resizes() + held.design(fit.kink) @ np.array([fit.coefficients[name] for name in NAMES])
    found: list[tuple[Prediction, Prediction | None]] = []
    for (n, march), ms in zip(held.pairs, map(float, predicted), strict=True):
        low, high = (ms * end for end in fit.bands.of(ms))
        bpu = Prediction(n.name, n.family, march, n.times[march], ms, low, high)
        host, latency = fit.hosts.get(march), None
        if host is not None and n.outputs and march in n.latencies:
            h = host.ms(n.outputs)
            ends = low + h * host.band[0], high + h * host.band[1]
            latency = Prediction(n.name, n.family, march, n.latencies[march], ms + h, *ends)
        found.append((bpu, latency))
    return found


def predict_network(network: Network, march: str, model: CostModel) -> float:
    """BPU time in ms of a network's totals on `march` by the parameters of `model`, as int8 whatever its dtype is."""
    f = CLOCKS[march]
    large = max(0.0, network.gmacs - model.large_gemm_gmac * network.gemms)
    compute = (
        model.gemm_us_ghz * 1e-3 * network.gemms
        + network.gmacs / model.gmac_per_ms_ghz
        + large / model.large_gmac_per_ms_ghz
        + network.attention_gmacs / model.attention_gmac_per_ms_ghz
        + network.softmax_melem / model.softmax_melem_per_ms_ghz
        + network.lut_melem / model.lut_melem_per_ms_ghz
        + network.resize_melem * model.element_prices["resize"][1]
    )
    return model.fixed_ms + compute / f + network.weight_mb / model.weight_mb_per_ms
