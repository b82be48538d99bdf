"""The settings of a repair: the steps that are tried on the float weights, and the samples that they read."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from qflow.core.limits import Between, check_limits

FEWEST = 4  # one of them is held out


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """One switch for each step (repair/steps.py), none by default. A repair does not depend on the rest of a trial."""

    equalize: bool = False
    """Factors between layers that leave the float function as it is."""
    observers: bool = False
    """Calibration methods of single operators, by the error of the outputs; no weight changes."""
    weight_clipping: bool = False
    """The largest weights of an operator clipped, so that its scale is smaller."""
    rounding: bool = False
    """Codes of int8 weights that keep the outputs of their operators, instead of the nearest ones."""
    reconstruction: bool = False
    """Codes of int8 weights that are learned layer by layer, then by blocks: minutes, not seconds."""
    bias: bool = False
    """Biases that take back the shift of the mean by quantization."""
    samples: Annotated[int, Between(FEWEST, 1_000_000)] = 256
    """Calibration samples that a repair reads; one in four decides and is not seen by the steps."""
    batch_size: Annotated[int, Between(1, 4096)] = 16
    """Samples in a batch of them."""

    def __post_init__(self) -> None:
        check_limits(self, "repair")

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps that are switched on."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is True)
