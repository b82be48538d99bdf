"""What the group `repair` of a configuration may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class RepairSchema:
    """Fields of qflow.core.repair_settings.RepairSettings."""

    equalize: bool = False
    observers: bool = False
    weight_clipping: bool = False
    rounding: bool = False
    reconstruction: bool = False
    bias: bool = False
    samples: int = 256
    batch_size: int = 16
