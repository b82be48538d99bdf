"""The groups that only `qflow.promote` has: goal, store and gate of a promotion."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class PromoteGoalSchema:
    """The goal at promote; null takes the study's, a number is at least as strict."""

    max_drop: float | None = None
    """Largest loss against float, in the metric's own units."""
    max_latency_ms: float | None = None
    """Largest predicted latency of one thread."""
    max_slowdown: float | None = None
    """Largest predicted latency over that with every operator at int8."""
    max_int16_mac_share: float | None = None
    """Largest share of MACs with an int16 side."""
    max_traffic_mb: float | None = None
    """Largest DDR traffic of a frame, in 10^6 bytes."""


@dataclass(kw_only=True)
class GateSchema:
    """Rules beside the goal that a version must keep; null switches a rule off."""

    max_class_drop: float | None = None
    """Largest drop of the mean score of one class (data.sample_classes)."""
    max_sample_drop: float | None = None
    """Largest drop of the score of one sample."""
    max_worse_share: float | None = None
    """Largest share of samples whose score is worse than in float."""
    max_worse_than_champion: float | None = None
    """Largest loss of the metric against the present champion."""
    max_slower_than_champion_ms: float | None = None
    """Largest rise of the predicted latency against the present champion."""
    allow_dominated: bool = False
    """Accept a version although the champion is as good in metric and latency, and better in one of them."""
