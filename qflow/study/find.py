"""What is found by a name in a store: the one study that has it, and the registered model that the study is for."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from qflow.bundle.bounded import read_config
from qflow.config.quoting import assignment
from qflow.core.credentials import masked
from qflow.core.errors import PromotionError, TrackingError
from qflow.core.temporary import TemporaryFolder
from qflow.tracking.artifacts import Store
from qflow.tracking.limits import model_name
from qflow.tracking.registry import champion

CHAMPION = "champion"
"""Alias of a command that names none."""


def one_study(store: Store, study: str, experiment: str | None, rule: str) -> tuple[str, str]:
    """Return experiment and run id of the study; `experiment` None looks in all.

    Raises TrackingError, which begins with `rule`, unless there is exactly one.
    """
    found = store.studies(study, experiment)
    if len(found) > 1:
        names = sorted(found)
        raise TrackingError(
            f"A study is in one experiment, but got {study} in {', '.join(names)}. Add "
            f"{assignment('tracking.experiment', names[0])}."
        )
    if not found:
        elsewhere = sorted(store.studies(study)) if experiment else []
        way_out = (
            f"It is in {', '.join(elsewhere)}: leave tracking.experiment out."
            if elsewhere
            else "Run qflow.tune first, or name it: study=<name>."
        )
        where = f"{masked(store.uri)}{f', experiment {experiment}' if experiment else ''}"
        raise TrackingError(f"{rule}, but got {study}, unknown in {where}. {way_out}")
    return next(iter(found.items()))


def best_run(store: Store, study_run: str) -> str | None:
    """Return the run of the best trial that a study names, or None. Raises TrackingError if it is another study's."""
    study = store.run(study_run)[0]
    best = study.get("qflow.best")
    if not best:
        return None
    trial = store.run(best)[0]
    if trial.get("mlflow.parentRunId") != study_run or trial.get("qflow.study") != study.get("qflow.study"):
        raise TrackingError(
            f"The best trial of a study is one of its own, but got run {best!r:.50} of another. Name the run that you "
            "mean by its id."
        )
    return best


def registered_place(store: Store, config: DictConfig) -> tuple[str, str]:
    """Return registered model and alias for a rollback: as `config` states them, else as `place_of_run` does."""
    if config.tracking.registered_model is not None:
        return model_name(config.tracking.registered_model), config.tracking.alias or CHAMPION
    rule = "A study must exist to be rolled back"
    run = config.run or one_study(store, config.study, config.tracking.experiment, rule)[1]
    with TemporaryFolder() as folder:
        store.download(store.run(run)[2], ["config.yaml"], Path(folder))
        started = read_config(Path(folder))
    return place_of_run(store, config, started)


def place_of_run(store: Store, config: DictConfig, started: DictConfig, run_id: str = "") -> tuple[str, str]:
    """Return registered model and alias: as `config` states them, else the name of the run's task and champion.

    A run is data and moves no alias of its choice: PromotionError is raised if its own configuration `started` states
    others, unless the alias is at the run `run_id` already.
    """
    stated, own = config.tracking, started.tracking
    place = model_name(stated.registered_model or started.task.name), stated.alias or CHAMPION
    of_run = model_name(stated.registered_model or own.registered_model), stated.alias or own.alias
    if of_run != place and not (run_id and (now := champion(store, *of_run)) is not None and now.run_id == run_id):
        keys = ("tracking.registered_model", "tracking.alias")
        words = [assignment(key, of_run[i]) for i, key in enumerate(keys) if of_run[i] != place[i]]
        raise PromotionError(
            f"A command names the model that it registers, or {place[0]}@{place[1]} is meant, but got "
            f"{of_run[0]}@{of_run[1]} from the run alone. If you mean it, add {' '.join(words)}."
        )
    return of_run
