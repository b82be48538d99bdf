"""Building objects from `_target_`s: the user's model, data, metric and loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hydra.errors import HydraException
from omegaconf import DictConfig

from qflow.config.settings import plain
from qflow.core.errors import ConfigError, QflowError

if TYPE_CHECKING:
    from qflow.tasks.task import Task
    from qflow.trial.training import Training


def build_task(config: DictConfig) -> Task:
    """Import and call the `_target_`s of the task. Raises ConfigError if one cannot be found or called."""
    from qflow.tasks.task import Task, make_task

    node = config.task
    device = config.executor.device
    stated: dict[str, Any] = {
        "stated_metric": node.float_metric,
        "tolerance": node.tolerance,
        "deploy_shape": plain(node).get("deploy_shape"),
        "cached_attrs": tuple(node.cached_attrs),
    }
    if node._target_:
        task = _call({"_target_": node._target_}, "task")
        if not isinstance(task, Task):
            raise ConfigError(f"task._target_ gives a qflow Task, but got {type(task).__name__}. Use make_task(...).")
        return task
    parts = {}
    for part in ("model", "data"):
        target = plain(node[part])
        if not target.get("_target_"):
            raise ConfigError(f"A task needs task.{part}._target_, but got none. Name your class or function.")
        parts[part] = _call(target, f"task.{part}")
    where, target = "task.metric", plain(node.metric)
    if config.get("metric") and config.metric._target_:
        where, target = "metric", plain(config.metric)
    metric = _call(target, where) if target.get("_target_") else None  # the data may choose theirs
    return make_task(name=node.name, device=device, **parts, metric=metric, **stated)


def build_model(config: DictConfig) -> Any:
    """Return what the `_target_` of the model gives, or the model of a task's own `_target_`, without its data.

    The random seed is that of the configuration, as at the start of a study. Raises ConfigError.
    """
    import torch

    if config.task._target_:
        return build_task(config).model
    target = plain(config.task.model)
    if not target.get("_target_"):
        raise ConfigError("A stored trial names its model, but got none in task.model._target_. Give model=...")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _call(target, "task.model")


def build_training(config: DictConfig) -> Training | None:
    """Return loss, optimizer and scheduler of `qat`; None without a loss and a teacher.

    Raises ConfigError for a failing `_target_`.

    A loss function is called with (outputs, batch); a loss class is instantiated first. Optimizer and scheduler are
    made later, with the parameters and the optimizer as arguments.
    """
    from hydra.utils import get_object

    from qflow.trial.training import Training

    node = plain(config.qat)
    loss = None
    if node["loss"].get("_target_"):
        try:
            found = get_object(node["loss"]["_target_"])
        except (HydraException, ImportError, ValueError) as error:
            raise ConfigError(f"qat.loss._target_ must import, but got: {' '.join(str(error).split())}") from error
        loss = _call(node["loss"] if isinstance(found, type) else {**node["loss"], "_partial_": True}, "qat.loss")
    elif not node["teacher"]["weight"]:
        return None
    optimizer = _call({**node["optimizer"], "_partial_": True}, "qat.optimizer")
    scheduled = node["scheduler"].get("_target_")
    scheduler = _call({**node["scheduler"], "_partial_": True}, "qat.scheduler") if scheduled else None
    return Training(loss, optimizer, scheduler)


def find_object(name: str, where: str) -> Any:
    """Return the class, function or module with this dotted name. Raises ConfigError."""
    from hydra.utils import get_object

    try:
        return get_object(name)
    except (HydraException, ImportError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{where} must be the dotted name of an object, but got {name}: {text}") from error


def get_function(name: str, where: str) -> Callable[..., Any]:
    """Return the function with this dotted name. Raises ConfigError."""
    from hydra.utils import get_method

    try:
        return get_method(name)
    except (HydraException, ImportError, ValueError) as error:
        raise ConfigError(f"{where} must be the dotted name of a function, but got {name}: {error}") from error


def _call(node: Mapping[str, Any], where: str) -> Any:
    from hydra.utils import instantiate

    if any("${" in text for text in texts(node)):  # Hydra would resolve it again, and call what it names
        raise ConfigError(f"Values of {where} are resolved before it is built, but got one with ${{. Remove the ${{.")
    try:
        return instantiate(node)
    except (HydraException, SystemExit) as error:  # the user's module may end the process
        cause = error.__cause__ or error
        if isinstance(cause, QflowError):  # a built-in part says itself what is wrong
            raise cause from None
        text = " ".join(str(cause).split()) if isinstance(error, HydraException) else f"SystemExit({error.code})"
        raise ConfigError(f"{where}._target_ must import and run, but got: {text}") from error


def texts(node: Any) -> Iterator[str]:
    """Yield every key and text in plain containers."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        yield from texts([*node, *node.values()])
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from texts(item)
