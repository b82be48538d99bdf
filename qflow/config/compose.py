"""Composition of a command's configuration by Hydra, which checks it against the schema; then the command runs."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TypeVar

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from qflow.config.command_schema import SCHEMAS, register_schema
from qflow.config.explain import explain
from qflow.config.key_limits import require_limits
from qflow.config.keys import conf_dir
from qflow.config.overrides import options_first, own_files, require_single, rewrite
from qflow.core.errors import ConfigError
from qflow.process.allocator import keep_freed_memory
from qflow.process.waiting import wait_briefly

T = TypeVar("T")


def composed(name: str, module: str, act: Callable[[DictConfig], T], arguments: Sequence[str]) -> T | None:
    """Return what `act` returns for the configuration of the command line; None where Hydra only printed it.

    `module` names the command in messages. Raises ConfigError for what Hydra refuses, in one line.
    """
    _set_up(name)
    ends: list[T] = []
    failed: list[BaseException] = []

    def job(config: DictConfig) -> None:
        try:
            require_known(config, name)
            require_limits(config, SCHEMAS[name])
            ends.append(act(config))
        except BaseException as error:  # raised again below, outside of Hydra
            failed.append(error)

    try:
        if name != "tune":
            require_single(arguments, module)
        with ExitStack() as folders:
            _compose(name, job, rewrite(own_files(arguments, folders)), _is_hydras(arguments))
        if failed:
            raise _handled(failed[0])
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(explain(error, name)) from error
    return ends[0] if ends else None


def _handled(error: BaseException) -> BaseException:
    """Return the error; one that is made to end a process, which only the user's code raises, as a ConfigError."""
    if isinstance(error, (Exception, KeyboardInterrupt)):
        return error
    from qflow.search.attempt import reason_of

    refused = ConfigError(
        f"Model, data, metric and loss of a task leave the end of the process to qflow, but got {reason_of(error)}. "
        "Raise RuntimeError there."
    )
    refused.__cause__ = error
    return refused


def overridden() -> list[str]:
    """Return the overrides of the command line, without those that `rewrite` has added; outside of a command none."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    return [text for text in HydraConfig.get().overrides.task if not text.startswith("++search.space.")]


def require_only(used: Collection[str], rule: str) -> None:
    """Raise ConfigError, which begins with `rule`, for an override of another group or key than `used`."""
    for text in overridden():
        if text.lstrip("+~").partition("=")[0].partition(".")[0] not in (*used, "hydra"):
            raise ConfigError(f"{rule}, but got {text}. Leave it out.")


def _is_hydras(arguments: Sequence[str]) -> bool:
    """Return whether an option or a key of Hydra itself is among the arguments, so that its own main has to act."""
    return any(text.startswith("-") or text.lstrip("+~").startswith("hydra") for text in arguments)


def _compose(name: str, job: Callable[[DictConfig], None], arguments: Sequence[str], hydras: bool) -> None:
    """Run `job` with the configuration. Hydra's main makes it twice, the first time to find out its mode."""
    import hydra
    from hydra.core.hydra_config import HydraConfig

    try:
        if hydras:
            sys.argv = [sys.argv[0], *options_first(arguments)]
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
            return
        with hydra.initialize_config_dir(str(conf_dir()), job_name=name, version_base="1.3"):
            whole = hydra.compose(name, list(arguments), return_hydra_config=True)
    except RecursionError as error:
        raise ConfigError(
            "A configuration file starts from others, but got a circle in their defaults. Take the file's own name out."
        ) from error
    except ValueError as error:  # an option of a group that is no name
        raise ConfigError(f"An override sets a key, or names an option of a group, but got {error}.") from error
    config = whole.copy()
    with open_dict(config):
        del config["hydra"]
    HydraConfig.instance().set_config(whole)
    try:
        job(config)
    finally:
        HydraConfig.instance().cfg = None  # as Hydra's main leaves it


def _set_up(name: str) -> None:
    """Set up the process: its threads and memory, where modules are found, and what Hydra prints."""
    wait_briefly()
    keep_freed_memory()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    warnings.filterwarnings("ignore", message=".*version_base.*")
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs errors that it raises too
    sys.path.insert(0, os.getcwd())  # the user's own task is found from the working folder
    register_schema(name)


def require_known(config: DictConfig, name: str) -> None:
    """Raise ConfigError for keys that are not in the schema; `+key=value` would add them without an error."""
    try:
        unresolved = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # plain containers, without schema
        OmegaConf.unsafe_merge(OmegaConf.structured(SCHEMAS[name]), unresolved)  # both are made for this alone
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, name)) from error
