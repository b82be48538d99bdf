"""The steps by name, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qflow.core.errors import ConfigError
from qflow.repair.base.contract import Step
from qflow.repair.calibration.observers import Observers
from qflow.repair.equalization.equalize import Equalize
from qflow.repair.weights.bias import FloatOutputs
from qflow.repair.weights.weight_clipping import WeightClipping
from qflow.repair.weights.weight_steps import Bias, Reconstruction, Reference, Rounding

STEPS: Mapping[str, Callable[[Reference], Step]] = {
    "equalize": lambda _: Equalize(),
    "observers": lambda _: Observers(),
    "weight_clipping": WeightClipping,
    "rounding": Rounding,
    "reconstruction": Reconstruction,
    "bias": Bias,
}
DEFAULT = ("equalize",)
"""The step that leaves the float function as it is, bit for bit."""


def steps_of(given: Sequence[str | Step] | None = None) -> tuple[Step, ...]:
    """Return the steps that are named, in the order of STEPS, then those that are given. Raises ConfigError for a name.

    The steps that change the float function aim at one reference: the float outputs before the first of them.
    """
    chosen = tuple(DEFAULT if given is None else given)
    for step in chosen:
        if not isinstance(step, Step) and step not in STEPS:
            raise ConfigError(f"A repair step is one of {', '.join(STEPS)}, but got {step!r}.")
    reference = Reference(FloatOutputs)
    named = [make(reference) for name, make in STEPS.items() if name in chosen]
    return (*named, *(step for step in chosen if isinstance(step, Step)))
