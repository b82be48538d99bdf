"""The steps by name, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from qflow.core.errors import ConfigError
from qflow.repair.contract import Step
from qflow.repair.equalize import Equalize

STEPS: Mapping[str, Callable[[], Step]] = {"equalize": Equalize}


def steps_of(given: Sequence[str | Step] | None = None) -> tuple[Step, ...]:
    """Return the steps that are named, or all. Raises ConfigError for an unknown name."""
    chosen = tuple(STEPS if given is None else given)
    for step in chosen:
        if not isinstance(step, Step) and step not in STEPS:
            raise ConfigError(f"A repair step is one of {', '.join(STEPS)}, but got {step!r}.")
    return tuple(step if isinstance(step, Step) else STEPS[step]() for step in chosen)
