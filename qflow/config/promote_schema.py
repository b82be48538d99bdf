"""The groups that only `qflow.promote` has: goal, store and gate of a promotion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from qflow.core.limits import AtLeast, Between


@dataclass(kw_only=True)
class PromoteGoalSchema:
    """The goal at promote; null takes the study's, a number is at least as strict."""

    max_drop: Annotated[float, AtLeast(0.0)] | None = None
    """Largest loss against float, in the metric's own units."""
    max_latency_ms: Annotated[float, AtLeast(0.0)] | None = None
    """Largest predicted latency of one thread."""
    max_slowdown: Annotated[float, AtLeast(1.0)] | None = None
    """Largest predicted latency over that with every operator at int8."""
    max_int16_mac_share: Annotated[float, Between(0.0, 1.0)] | None = None
    """Largest share of MACs with an int16 side."""
    max_traffic_mb: Annotated[float, AtLeast(0.0)] | None = None
    """Largest DDR traffic of a frame, in 10^6 bytes."""


@dataclass(kw_only=True)
class GateSchema:
    """Rules beside the goal that a version must keep; null switches a rule off."""

    max_class_drop: Annotated[float, AtLeast(0.0)] | None = None
    """Largest drop of the mean score of one class (data.sample_classes)."""
    max_sample_drop: Annotated[float, AtLeast(0.0)] | None = None
    """Largest drop of the score of one sample."""
    max_worse_share: Annotated[float, Between(0.0, 1.0)] | None = None
    """Largest share of samples whose score is worse than in float."""
    max_worse_than_champion: Annotated[float, AtLeast(0.0)] | None = None
    """Largest loss of the metric against the present champion."""
    max_slower_than_champion_ms: Annotated[float, AtLeast(0.0)] | None = None
    """Largest rise of the predicted latency against the present champion."""
    allow_dominated: bool = False
    """Accept a version although the champion is as good in metric and latency, and better in one of them."""
