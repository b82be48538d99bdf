"""The noise of a metric: how far two trials may differ by the choice of the evaluation samples alone.

Trials are evaluated on the same samples, so the noise of a difference is that of the paired differences. Where scores
per sample are not kept, a bound for hits and misses takes its place, which is larger. Frames of one sequence are alike:
what is independent, and counted, are the sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

SIGMAS = 2.0
"""Standard errors beyond which a difference is taken as real."""
PAIRED, BY_SEQUENCE = "paired by sample", "paired by sequence"
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


@dataclass(frozen=True)
class Margin:
    """A distance in the metric's unit, such as that of a drop from the goal, and its noise."""

    distance: float
    noise: Noise

    @property
    def sure(self) -> bool:
        """Whether the distance is larger than its noise."""
        return abs(self.distance) > SIGMAS * self.noise.error

    def __str__(self) -> str:
        noise = f"{SIGMAS * self.noise.error:.4f} (two standard errors, {self.noise.how})"
        return f"{abs(self.distance):.4f}, noise {noise}"


def difference_noise(
    first: float,
    second: float,
    samples: int,
    scores: tuple[Sequence[float], Sequence[float]] | None = None,
    sequences: Sequence[int] = (),
) -> Noise:
    """Return the noise of the difference of two metrics over `samples` samples, in the metric's unit.

    With `scores` (one a sample, for both trials) it is the standard deviation of the paired differences over the root
    of their number. Where the samples are frames of `sequences` (their lengths, in order), the differences of a
    sequence, each less the mean, are added first (the standard error for clusters): for equal lengths this is that of
    the sequences' means. Without scores, a metric that counts hits, which both values show by being whole numbers of
    samples, has the error of two independent shares, sqrt((p(1-p) + q(1-q)) / n), and at least one of n; n counts the
    sequences, if there are any. Another metric's noise is not known.
    """
    if scores is not None and len(scores[0]) == len(scores[1]) > 1 and sum(sequences) in (0, len(scores[0])):
        gaps = [a - b for a, b in zip(*scores, strict=True)]
        mean, lengths = sum(gaps) / len(gaps), sequences or [1] * len(gaps)
        ends = list(accumulate(lengths))
        sums = [sum(gap - mean for gap in gaps[end - length : end]) for length, end in zip(lengths, ends, strict=True)]
        if len(sums) > 1:
            variance = sum(part**2 for part in sums) * len(sums) / (len(sums) - 1)
            return Noise(math.sqrt(variance) / len(gaps), BY_SEQUENCE if sequences else PAIRED)
    counts = samples > 0 and all(
        0.0 <= v <= 1.0 and abs(v * samples - round(v * samples)) <= 1e-6 * samples for v in (first, second)
    )
    if not counts:
        return Noise(math.inf, "not known: the metric is no share of samples, and scores per sample are not kept")
    count = len(sequences) or samples
    error = math.sqrt((first * (1.0 - first) + second * (1.0 - second)) / count)
    return Noise(max(error, 1.0 / count), BINOMIAL)
