"""Predictions of measured networks: their errors, intervals from the residuals of left-out rows, and coverage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

SHORT_MS = 1.0
"""BPU time in ms below which a network has the intervals of short ones, where fixed costs decide."""
COVERAGE = 0.90
"""Share of measured times that an interval is meant to contain."""
FEWEST = 15
"""Rows from which a regime has an interval of its own."""
Band = tuple[float, float]
"""Lower and upper end of an interval, relative to the prediction."""


@dataclass(frozen=True)
class Prediction:
    """One measured time in ms, its prediction by a fit without its group, and the interval of that prediction."""

    name: str
    family: str
    march: str
    measured: float
    predicted: float
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class Bands:
    """The intervals of short and of longer networks, relative to the predicted BPU time."""

    short: Band
    longer: Band

    def of(self, ms: float) -> Band:
        """The interval of a network with a predicted BPU time of `ms`."""
        return self.short if ms < SHORT_MS else self.longer


def band_of(ratios: Sequence[float]) -> Band:
    """The interval that contains `COVERAGE` of further ratios measured / predicted, as many below as above.

    The ends are order statistics (split conformal prediction): of n ratios, those of rank (n + 1) * 0.05 and
    (n + 1) * 0.95. It always contains 1.
    """
    ranked, n = sorted(ratios), len(ratios)
    outside = (n + 1) * (1.0 - COVERAGE) / 2.0 + 1e-9
    low = ranked[max(math.floor(outside), 1) - 1]
    high = ranked[min(n + 1 - math.floor(outside), n) - 1]
    return min(low, 1.0), max(high, 1.0)


def bands_of(predicted: Sequence[float], ratios: Sequence[float]) -> Bands:
    """The intervals by regime from the ratios measured / predicted of left-out rows; a regime of few rows has that of
    all.
    """
    every = band_of(ratios)
    regimes = [
        [r for p, r in zip(predicted, ratios, strict=True) if (p < SHORT_MS) == short] for short in (True, False)
    ]
    short, longer = (band_of(found) if len(found) >= FEWEST else every for found in regimes)
    return Bands(short, longer)


@dataclass(frozen=True)
class Errors:
    """Relative errors of predictions; `inside` is the share of measured times inside their intervals."""

    rows: int
    median: float
    p90: float
    worst: float
    worst_name: str
    inside: float
    width: float
    """Upper over lower end of the interval, in the median."""
    spearman: Mapping[str, float]
    """March -> rank correlation; a march with fewer than three rows or with equal values has none."""

    def __str__(self) -> str:
        ranks = ", ".join(f"{march} {value:.3f}" for march, value in self.spearman.items())
        return (
            f"{self.rows} rows: median {self.median:.1%}, 90th percentile {self.p90:.1%}, worst {self.worst:.1%} "
            f"({self.worst_name}), {self.inside:.0%} inside the interval" + (f", Spearman {ranks}" if ranks else "")
        )


def errors_of(predictions: Sequence[Prediction]) -> Errors:
    """Errors of predictions, relative to the measured times."""
    off = [abs(p.predicted / p.measured - 1.0) for p in predictions]
    worst = max(range(len(off)), key=off.__getitem__)
    return Errors(
        rows=len(off),
        median=float(np.median(off)),
        p90=float(np.percentile(off, 90)),
        worst=off[worst],
        worst_name=f"{predictions[worst].name} on {predictions[worst].march}",
        inside=sum(p.low <= p.measured <= p.high for p in predictions) / len(off),
        width=float(np.median([p.high / p.low if p.low > 0.0 else math.inf for p in predictions])),
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
