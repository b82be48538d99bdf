"""Fits the parameters of the cost model to networks whose time was measured, and validates the predictions.

The fit is a relative non-negative least squares: it minimizes the sum over rows of (predicted / measured - 1)^2, with
no coefficient below 0, plus (strength * (c / c0 - 1))^2 for each coefficient, with a published fit c0 as prior. A
coefficient that the rows hardly determine (attention, of which they contain little) therefore stays close to the value
from the larger published set. Attention was published in two forms, by softmax elements and by matmul MACs; each counts
half. Clocks are given; T0 and B do not scale with them. The surcharge on large GEMMs is qflow's own: its prior is a
rounded value of what the rows give, so that a few large networks do not determine it by chance.

The validation leaves out whole families, then single networks, and predicts each march from the rows of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qflow.core.errors import ConfigError
from qflow.core.record import digest
from qflow.cost_model.latency import INT8_INTERVAL
from qflow.cost_model.model import CostModel
from qflow.cost_model.networks import CLOCKS, COLUMNS, Network

Array = NDArray[np.float64]
STRENGTH = 0.3
"""Strength of the prior, for residuals of about 0.07 per row: coefficients are expected within a quarter of it."""
KINK = 0.5
"""GMAC per GEMM beyond which a network's MACs cost more (`CostModel.large_gemm_gmac`); 0.3 to 0.6 fit about as well."""
NEVER = 1e9
"""A kink in GMAC beyond any network: no surcharge."""
# Published fits on all rows (their sources: docs/cost-model.md); ms, or ms * GHz, per unit of the column. Attention by
# softmax elements was 0.142, by matmul MACs 2.23: half of each. Large GEMMs: see above.
PRIOR = {
    "fixed": 0.062,
    "gemms": 1.6e-3,
    "gmacs": 0.0663,
    "large_gmacs": 0.03,
    "attention_gmacs": 1.115,
    "softmax_melem": 0.071,
    "lut_melem": 0.0361,
    "weight_mb": 0.0155,
}
NAMES = tuple(PRIOR)


@dataclass(frozen=True)
class Errors:
    """Relative errors of predictions; `inside` is the share of measured times inside `interval_of`."""

    rows: int
    median: float
    p90: float
    worst: float
    worst_name: str
    inside: float
    spearman: Mapping[str, float]
    """March -> rank correlation; a march with fewer than three rows or with equal values has none."""

    def __str__(self) -> str:
        ranks = ", ".join(f"{march} {value:.3f}" for march, value in self.spearman.items())
        return (
            f"{self.rows} rows: median {self.median:.1%}, 90th percentile {self.p90:.1%}, worst {self.worst:.1%} "
            f"({self.worst_name}), {self.inside:.0%} inside the interval" + (f", Spearman {ranks}" if ranks else "")
        )


@dataclass(frozen=True)
class Prediction:
    """One measured time, and its prediction by a fit without its group; ms."""

    name: str
    family: str
    march: str
    measured: float
    predicted: float


@dataclass(frozen=True)
class Fit:
    """Coefficients by `NAMES`, and the validation of the fit."""

    coefficients: Mapping[str, float]
    families: Sequence[str]
    rows: int
    kink: float
    data: str
    """Digest of the rows."""
    left_out: Mapping[str, Sequence[Prediction]]
    """`family`, `network`, and `<march> from the others` -> predictions."""

    def errors(self, how: str) -> Errors:
        """Errors of one kind of validation, a key of `left_out`."""
        return errors_of(self.left_out[how])

    def apply(self, model: CostModel) -> CostModel:
        """`model` with the fitted parameters and their provenance."""
        c = self.coefficients
        return replace(
            model,
            fixed_ms=_round(c["fixed"]),
            gemm_us_ghz=_round(1e3 * c["gemms"]),
            large_gemm_gmac=self.kink,
            provenance=self.provenance(),
            **{field: _inverse(c[name]) for name, field in RATE_OF.items()},  # type: ignore[arg-type]
        )

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
    """One row per network and march: the design matrix in the order of `NAMES`, measured times."""

    design: Array
    times: Array
    names: list[str]
    families: list[str]
    marches: list[str]

    def only(self, kept: NDArray[np.bool_]) -> _Rows:
        pick = [i for i, k in enumerate(kept) if k]
        lists = ([column[i] for i in pick] for column in (self.names, self.families, self.marches))
        return _Rows(self.design[kept], self.times[kept], *lists)


def _rows(networks: Sequence[Network], kink: float) -> _Rows:
    pairs = [(n, march, t) for n in networks if n.dtype == "int8" for march, t in n.times.items()]
    design = []
    for n, march, _ in pairs:
        large = max(0.0, n.gmacs - kink * n.gemms)
        work = {**{field: getattr(n, field) for field in COLUMNS}, "large_gmacs": large, "fixed": 1.0}
        design.append([work[name] / (1.0 if name in ("fixed", "weight_mb") else CLOCKS[march]) for name in NAMES])
    return _Rows(
        np.array(design, dtype=float).reshape(-1, len(NAMES)),
        np.array([t for *_, t in pairs], dtype=float),
        [n.name for n, *_ in pairs],
        [n.family for n, *_ in pairs],
        [march for _, march, _ in pairs],
    )


def _solve(rows: _Rows, strength: float) -> Array:
    from scipy.optimize import nnls

    prior = np.array([PRIOR[name] for name in NAMES])
    a = np.vstack([rows.design / rows.times[:, None], np.diag(strength / prior)])
    b = np.concatenate([np.ones(len(rows.times)), np.full(len(prior), strength)])
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0] = 1.0
    solution: Array = nnls(a / scale, b)[0] / scale
    return solution


def fit_networks(networks: Sequence[Network], strength: float = STRENGTH, kink: float = KINK) -> Fit:
    """Fit the int8 rows of `networks` and validate. Raises ConfigError for fewer than ten times."""
    rows = _rows(networks, kink)
    if len(rows.times) < 10:
        raise ConfigError(f"A fit needs at least ten int8 times, but got {len(rows.times)}. Add networks.")
    validated: dict[str, list[Prediction]] = {}
    if len(set(rows.families)) > 1:
        validated["family"] = _left_out(rows, rows.families, strength)
    validated["network"] = _left_out(rows, rows.names, strength)
    for march in sorted(set(rows.marches)) if len(set(rows.marches)) > 1 else ():
        test = np.array([m == march for m in rows.marches])
        validated[f"{march} from the others"] = _predictions(rows, test, strength)
    return Fit(
        coefficients=dict(zip(NAMES, map(float, _solve(rows, strength)), strict=True)),
        families=tuple(sorted(set(rows.families))),
        rows=len(rows.times),
        kink=kink,
        data=digest([[n, m, float(t)] for n, m, t in zip(rows.names, rows.marches, rows.times, strict=True)]),
        left_out=validated,
    )


def _left_out(rows: _Rows, groups: Sequence[str], strength: float) -> list[Prediction]:
    found: list[Prediction] = []
    for group in sorted(set(groups)):
        found += _predictions(rows, np.array([g == group for g in groups]), strength)
    return found


def _predictions(rows: _Rows, test: NDArray[np.bool_], strength: float) -> list[Prediction]:
    held = rows.only(test)
    predicted = held.design @ _solve(rows.only(~test), strength)
    columns = (held.names, held.families, held.marches, map(float, held.times), map(float, predicted))
    return [Prediction(*cells) for cells in zip(*columns, strict=True)]


# ---- errors


def interval_of(prediction: Prediction) -> tuple[float, float]:
    """The interval of int8 convolutional networks in ms; for a network with softmax qflow prints a wider one."""
    low, high = INT8_INTERVAL
    return prediction.predicted * low, prediction.predicted * high


def errors_of(predictions: Sequence[Prediction]) -> Errors:
    """Errors of predictions, relative to the measured times."""
    off = [abs(p.predicted / p.measured - 1.0) for p in predictions]
    ends = [(p.measured, *interval_of(p)) for p in predictions]
    worst = max(range(len(off)), key=off.__getitem__)
    return Errors(
        rows=len(off),
        median=float(np.median(off)),
        p90=float(np.percentile(off, 90)),
        worst=off[worst],
        worst_name=f"{predictions[worst].name} on {predictions[worst].march}",
        inside=sum(low <= t <= high for t, low, high in ends) / len(off),
        spearman=_spearman(predictions),
    )


def _spearman(predictions: Sequence[Prediction]) -> dict[str, float]:
    from scipy.stats import spearmanr

    found = {}
    for march in sorted({p.march for p in predictions}):
        pairs = [(p.measured, p.predicted) for p in predictions if p.march == march]
        if len(pairs) > 2 and all(len(set(column)) > 1 for column in zip(*pairs, strict=True)):
            found[march] = float(spearmanr(pairs).statistic)
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
    )
    return model.fixed_ms + compute / f + network.weight_mb / model.weight_mb_per_ms
