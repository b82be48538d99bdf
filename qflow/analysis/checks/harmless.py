"""What measured sensitivities say of a finding: it is worth a look, or harmless and therefore information."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping

from qflow.analysis.measures.tables import Finding

NOISE = 0.05  # of the largest sensitivity


def noise_level(scores: Collection[float]) -> float:
    """Return the sensitivity above which an operator stands out: 5 % of the largest one, and at least the median."""
    finite = [score for score in scores if math.isfinite(score)]
    return max(NOISE * max(finite, default=0.0), statistics.median(finite) if finite else 0.0)


def judged(op: str, text: str, scores: Mapping[str, float]) -> Finding:
    """Return the finding `text` on an operator's values: information if its measured sensitivity is within the noise.

    `scores` are activation sensitivities, empty if they are unknown.
    """
    if op in scores and scores[op] <= noise_level(scores.values()):
        return Finding(op, "info", f"{text}; it is not sensitive")
    return Finding(op, "check", text)
