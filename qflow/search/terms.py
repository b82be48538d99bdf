"""What an Optuna study keeps for its whole life: its space and directions, the names of its objectives, its runs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna

from qflow.core import record
from qflow.core.errors import ConfigError, TrackingError
from qflow.search.domain import Space, space_dict

TERMS, RUN, LATE = "qflow.terms", "qflow.study_run", "qflow.run/"  # user attributes of the Optuna study


@dataclass(frozen=True)
class Terms:
    """The terms of one study. Any start may compare its own with those that are kept; the owner alone writes them."""

    study: optuna.Study
    space: Space
    directions: tuple[str, ...]
    metrics: Sequence[str] = ()

    def require(self) -> bool:
        """Return whether the terms must be written. Raises ConfigError if a study with trials has another space."""
        name, kept, named = self.study.study_name, self.study.user_attrs.get(TERMS), self._named()
        if kept == named:
            return False
        untried = not self.study.get_trials(deepcopy=False)
        if untried and (kept is None or kept["directions"] == named["directions"]):  # Optuna cannot change these
            return True
        if kept is None:
            raise ConfigError(
                f"A study is one that qflow started, but got a foreign one for '{name}'. Give the search another study "
                "name."
            )
        old, new = kept["space"], named["space"]
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k)) or ["directions"]
        raise ConfigError(
            f"A study keeps the space it was started with, but got another one for '{name}' "
            f"(changed: {', '.join(changed)}). Use another name: study={name}-2."
        )

    def write(self) -> None:
        """Write the terms unless they are kept already. Raises as `require`."""
        if self.require():
            self.study.set_user_attr(TERMS, self._named())
        if self.metrics and self.study.metric_names != list(self.metrics):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names(list(self.metrics))

    def _named(self) -> dict[str, Any]:
        terms = {"space": space_dict(self.space), "directions": list(self.directions)}
        return {**terms, "digest": record.digest(terms)}


def require_run(study: optuna.Study, run: str | None) -> None:
    """Raise TrackingError if the study has another run in MLflow than `run`, which is then in another store."""
    known = study.user_attrs.get(RUN, run)
    if known != run:
        raise TrackingError(
            f"A search in a search.storage has one tracking store, but got a second one for {study.study_name}, which "
            f"has its run {known} in another. Name the tracking.uri that it began with, or use another name: "
            f"study={study.study_name}-2."
        )


def note_run(study: optuna.Study, run: str) -> None:
    """Note the run of the study in MLflow."""
    if study.user_attrs.get(RUN) != run:
        study.set_user_attr(RUN, run)


def note_late_run(study: optuna.Study, number: int, run: str) -> None:
    """Note the MLflow run of a trial that has ended already, to which Optuna adds nothing any more."""
    study.set_user_attr(f"{LATE}{number}", run)


def late_run(attrs: Mapping[str, Any], number: int) -> str | None:
    """Return the run that was noted for a trial, from the user attributes of its study."""
    return attrs.get(f"{LATE}{number}")
