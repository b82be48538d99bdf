"""The evaluator of a configuration, with task, device rules and cost model; every command builds it here."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from qflow.analysis.measures.metrics import CUSTOM, Custom, custom_metric
from qflow.config.build import build_task, build_training, get_function
from qflow.config.device_file import cost_of, require_cost, rules_of
from qflow.config.settings import plain, sensitivity_settings, trial_settings
from qflow.core.dtype import QDtype
from qflow.core.engine import EngineName, engine_name
from qflow.core.errors import ConfigError
from qflow.cost_model.model import CostModel
from qflow.plugin.engine import PluginEngine
from qflow.quant.model.shared_modules import split_names
from qflow.search.objective import Goal
from qflow.tasks.task import Task
from qflow.trial.engine import Engine, OwnEngine
from qflow.trial.evaluator import Evaluator
from qflow.trial.record import RUN_METRICS


def make_evaluator(config: DictConfig) -> Evaluator:
    """Build the evaluator with task, device rules and cost model. Raises ConfigError."""
    device = config.executor.device
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ConfigError(
            f"executor.device is cpu or a GPU that torch sees, but got {device}. Use executor.device=cpu."
        )
    if config.executor.threads:
        torch.set_num_threads(config.executor.threads)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = False  # TF32 ruins int16: 78 to 86 % of the outputs come out wrong
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    settings = trial_settings(config)
    return Evaluator(
        task=build_task(config),
        rules=rules_of(config.device),
        cost_model=cost_model(config),
        sensitivity_settings=sensitivity_settings(config),
        default_calibration=settings.calibration,
        default_repair=settings.repair,
        eval_batch=config.task.batch_size,
        skip=tuple(config.quant.skip),
        fold_functional_norms=config.quant.fold_functional_norms,
        split_shared=tuple(map(str, split_names(plain(config.quant)["split_shared"]))),
        engine=make_engine(engine_name(config.engine)),
        training=build_training(config),
        own_metric=own_metric(config),
        profile=config.device.profile,
        profile_dtype=QDtype.parse(config.device.profile_dtype, "device.profile_dtype"),
    )


def make_engine(name: EngineName) -> Engine:
    """Return the engine of this name. Raises ConfigError if the plugin is asked for and not installed."""
    return PluginEngine() if name == EngineName.plugin else OwnEngine()


def study_goal(config: DictConfig, task: Task) -> Goal:
    """Return the goal of a study on its task, with what is optimized. Raises ConfigError."""
    accuracy = f"accuracy/{task.metric_name}"
    return Goal(**plain(config.objective)).aimed(accuracy, task.direction, (accuracy, *RUN_METRICS))


def cost_model(config: DictConfig) -> CostModel | str:
    """Return the device's cost model, or why it has none."""
    try:
        require_cost(config.device, config.device.march)
    except ConfigError as error:
        return str(error)
    return cost_of(config.device)


def own_metric(config: DictConfig) -> Custom | None:
    """Return the user's metric for bad cases, or None. Raises ConfigError."""
    node = sensitivity_settings(config).own_metric
    if not node["_target_"]:
        return None
    return custom_metric(CUSTOM, get_function(node["_target_"], "sensitivity.own_metric"), node["order"])
