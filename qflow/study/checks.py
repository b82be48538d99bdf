"""Checks that run before anything heavy is imported: they refuse settings and searches that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from qflow.config.command_schema import TuneSchema
from qflow.config.device_file import cost_of, require_cost, rules_of
from qflow.config.executor_schema import check_executor
from qflow.config.key_limits import require_limits
from qflow.config.settings import plain, sensitivity_settings, trial_settings
from qflow.config.space import search_space
from qflow.core.credentials import masked
from qflow.core.dtype import QDtype
from qflow.core.engine import EngineName, engine_name, require_plugin
from qflow.core.errors import ConfigError
from qflow.core.limits import check_shape
from qflow.core.names import check_study_name
from qflow.core.store import sqlite_path
from qflow.study.start_files import start_files

if TYPE_CHECKING:
    from omegaconf import DictConfig


def check_config(config: DictConfig) -> None:
    """Raise ConfigError for settings that cannot work with any command."""
    from qflow.search.objective import Goal

    require_limits(config, TuneSchema)
    settings = trial_settings(config)
    sensitivity_settings(config)
    Goal(**plain(config.objective))
    check_search(config)
    check_executor(config)
    _check_engine(config, bool(settings.qat.steps))
    _check_loss(config, bool(settings.qat.steps))
    _check_float16(config, bool(settings.qconfig.float16_count))
    _check_trains(config, bool(settings.qat.steps))
    _check_task(config)
    _check_device(config)


def _check_engine(config: DictConfig, trains: bool) -> None:
    if engine_name(config.engine) == EngineName.qflow:
        return
    require_plugin()
    if trains:
        raise ConfigError(
            "engine=plugin does not train, but got qat.steps to train with. Use qat=none, or train with engine=qflow."
        )


def require_own_engine(config: DictConfig, command: str) -> None:
    """Raise ConfigError for the plugin's engine at a command that would not use it."""
    if engine_name(config.engine) != EngineName.qflow:
        raise ConfigError(
            f"The plugin evaluates the trials of qflow.tune and qflow.trial, but got engine={config.engine} for "
            f"qflow.{command}. Use engine=qflow."
        )


def require_no_workers(config: DictConfig, command: str) -> None:
    """Raise ConfigError for worker processes at a command that would not use them."""
    if config.executor.kind != "serial":
        raise ConfigError(
            f"Worker processes evaluate the trials of qflow.tune, but got executor.kind={config.executor.kind} for "
            f"qflow.{command}. Use executor=serial."
        )


def _check_task(config: DictConfig) -> None:
    check_shape("task.deploy_shape", plain(config.task)["deploy_shape"])


def _check_device(config: DictConfig) -> None:
    device = config.device
    rules_of(device)
    if not any(OmegaConf.is_missing(device.cost, key) for key in device.cost):  # rules alone serve some commands
        cost_of(device)
    QDtype.parse(device.profile_dtype, "device.profile_dtype")
    if device.profile is not None and not Path(device.profile).is_file():
        raise ConfigError(
            f"device.profile is a measured report, a file, but got {device.profile!r}, which is none. Correct the "
            "path, or null predicts from the cost model."
        )


def check_study(config: DictConfig) -> None:
    """Raise ConfigError for a search with points that no trial can run. Only studies have a search."""
    check_study_name(config.study)
    check_config(config)
    _check_storage(config)
    require_cost(config.device, config.device.march)
    space = search_space(config)
    if config.qconfig.template != "qint8":
        raise ConfigError(
            f"A study measures all-int8 and all-int16 and promotes operators from int8, but got qconfig.template="
            f"{config.qconfig.template}. Leave it out, or name operators: qconfig.modules={{<name>: "
            f"{config.qconfig.template}}}."
        )
    _check_loss(config, "qat.steps" in space)
    _check_trains(config, "qat.steps" in space)
    if config.qat.steps and config.qat.apply == "after_search":
        for rate in config.search.rates:  # where the rates of single modules keep their ratio, one may become too large
            trial_settings(config, {"qat.learning_rate": rate})
    _check_engine(config, "qat.steps" in space)
    searched = sorted(key for key in space if key.startswith("qat."))
    if searched and config.qat.apply == "after_search":
        raise ConfigError(
            f"qat.apply=after_search leaves training out of the search, but got {searched[0]} to search. Use "
            f"qat.apply=every_trial, or take it out: search.space.{searched[0]}=null."
        )
    chosen = "fp16" in config.workflow or config.workflow == "full"
    _check_float16(config, chosen or "qconfig.float16_count" in space)
    for point in plain(config.search.enqueue):
        trial_settings(config, point)
    start_files(config)


def _check_loss(config: DictConfig, trains: bool) -> None:
    if trains and not plain(config.qat.loss).get("_target_") and not config.qat.teacher.weight:
        raise ConfigError(
            "QAT needs a loss, but got none. Set qat.loss._target_ to a function of (outputs, batch), let the float "
            "model teach (qat.teacher.weight=1), or use qat=none."
        )


def _check_trains(config: DictConfig, trains: bool) -> None:
    if trains and config.task.cached_attrs:
        raise ConfigError(
            "QAT trains on single samples in random order, but got a model with state, task.cached_attrs="
            f"{list(config.task.cached_attrs)}. Use qat=none."
        )


def _check_float16(config: DictConfig, chosen: bool) -> None:
    """Raise ConfigError if fp16 operators are chosen by errors that will not be measured."""
    absent = [dtype for dtype in ("qint16", "float16") if dtype not in config.sensitivity.dtypes]
    if chosen and absent:
        raise ConfigError(
            f"Operators get fp16 by what they lose at int16 and at fp16, but got sensitivity.dtypes="
            f"{list(config.sensitivity.dtypes)} without {absent[0]}. Set sensitivity.dtypes=[qint8,qint16,float16]."
        )


def check_search(config: DictConfig) -> None:
    """Raise ConfigError for a training stage without a rate or a weight decay."""
    if not config.search.rates:
        raise ConfigError("search.rates holds learning rates above 0, but got none. Leave it out.")
    if not config.search.weight_decays:
        raise ConfigError("search.weight_decays holds numbers of at least 0, but got none. Leave it out.")


def _check_storage(config: DictConfig) -> None:
    """Raise ConfigError for a shared search whose runs, which record its owner, are not shared."""
    storage = config.search.storage
    if storage is None:
        return
    if "://" not in storage:
        raise ConfigError(
            f"search.storage is the URL of a database, but got {masked(storage)!r}. Name postgresql://HOST/NAME."
        )
    if config.tracking.uri is None:
        raise ConfigError(
            f"A search that folders share has its runs in one store too, but got search.storage={masked(storage)} and "
            "no tracking.uri. Name it: tracking.uri=postgresql://HOST/NAME."
        )
    if _place(storage) == _place(config.tracking.uri):
        raise ConfigError(
            "Searches and runs have a database each, as Optuna and MLflow keep tables of one name there, but got "
            f"{masked(storage)} for both search.storage and tracking.uri. Name another database for one of them."
        )


def _place(url: str) -> object:
    """Return what tells a database from another, whatever its driver and user."""
    parts = urlsplit(url)
    database = sqlite_path(url) or (parts.netloc.rpartition("@")[2], parts.path, parts.query)
    return parts.scheme.partition("+")[0], database
