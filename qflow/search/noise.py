"""The noise of a metric: how far two trials may differ by the choice of the evaluation samples alone.

Trials are evaluated on the same samples, so the noise of a difference is that of the paired differences. Where scores
per sample are not kept, a bound for hits and misses takes its place, which is larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PAIRED = "paired by sample"
BINOMIAL = "a binomial bound, because scores per sample are not kept"


@dataclass(frozen=True)
class Noise:
    """Standard error of a difference of two metrics, and how it was found; infinite if it is not known."""

    error: float
    how: str

    @property
    def known(self) -> bool:
        """Whether the noise is known."""
        return math.isfinite(self.error)


def difference_noise(
    first: float, second: float, samples: int, scores: tuple[Sequence[float], Sequence[float]] | None = None
) -> Noise:
    """Return the noise of the difference of two metrics over `samples` samples, in the metric's unit.

    With `scores` (one a sample, for both trials) it is the standard deviation of the paired differences over the root
    of their number. Without, a metric that counts hits, which both values show by being whole numbers of samples, has
    the error of two independent shares: sqrt((p(1-p) + q(1-q)) / n). Another metric's noise is not known.
    """
    if scores is not None and len(scores[0]) == len(scores[1]) > 1:
        gaps = [a - b for a, b in zip(*scores, strict=True)]
        mean = sum(gaps) / len(gaps)
        variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
        return Noise(math.sqrt(variance / len(gaps)), PAIRED)
    counts = samples > 0 and all(
        0.0 <= v <= 1.0 and abs(v * samples - round(v * samples)) <= 1e-6 * samples for v in (first, second)
    )
    if not counts:
        return Noise(math.inf, "not known: the metric is no share of samples, and scores per sample are not kept")
    return Noise(math.sqrt((first * (1.0 - first) + second * (1.0 - second)) / samples), BINOMIAL)
