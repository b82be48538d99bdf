"""The records of a study, its proposals and trials, and the check of its arguments; without importing optuna."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qflow.core.errors import ConfigError
from qflow.core.names import check_study_name
from qflow.core.nearest import did_you_mean
from qflow.search.domain import Choice, Scalar, Space, parents_first

SAMPLERS = ("tpe", "nsga2", "gp", "random")


@dataclass(frozen=True)
class Proposal:
    """A point to evaluate; `label` names a fixed trial and is empty otherwise."""

    number: int
    params: Mapping[str, Scalar]
    label: str


@dataclass(frozen=True)
class StudyTrial:
    """One trial as the study stores it."""

    number: int
    state: str  # waiting, running, complete, fail
    params: Mapping[str, Scalar]
    label: str
    objectives: tuple[float, ...]  # empty unless complete
    constraints: Mapping[str, float]
    run_id: str | None
    marker: str | None
    attempt: int  # how often a trial at this point was lost before
    ending: str  # "" | failed | lasting | lost | interrupted | twin | screened
    reason: str


def check_arguments(name: str, space: Space, directions: tuple[str, ...], sampler: str) -> None:
    """Raise ConfigError for arguments with which no study can be opened."""
    check_study_name(name)
    if not space:
        raise ConfigError(
            "A search needs a key that is open, but got a value for every one. Leave one out, or write a range for it: "
            "qconfig.int16_ratio=interval(0,1), or choice(0.3) for that value alone."
        )
    parents_first(space)
    for key, domain in space.items():
        if isinstance(domain, Choice) and len(set(domain.values)) < len(domain.values):  # Optuna reads 1 back for True
            raise ConfigError(f"A study cannot tell true from 1 nor false from 0, but got both for {key}. Keep one.")
    if not directions or any(d not in ("maximize", "minimize") for d in directions):
        raise ConfigError(f"Directions are maximize or minimize, one per objective, but got {directions}.")
    if sampler not in SAMPLERS:
        near = did_you_mean(sampler, SAMPLERS)
        raise ConfigError(f"A sampler is one of {', '.join(SAMPLERS)}, but got {sampler!r}.{near}")
