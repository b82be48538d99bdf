"""python -m qflow.tune +experiment=int8_int16: tune the precision mix of a model, every trial tracked.

Exit code 0: the goal is met; 1: it is not (the nearest miss is named); 2: a mistake in what was asked.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflow import config as conf
from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qflow.analysis.metrics import Custom
    from qflow.bench import Bench


STARTED = time.perf_counter()


def main() -> None:
    """Entry point."""
    conf.run_door("tune", tune)


def tune(config: DictConfig) -> int:
    """Check everything that needs no model, assemble the parts, and run the workflow between beginning and end.

    A budget that is spent ends the workflow, never the study: what is known then is told as usual.
    """
    workflow = find_workflow(conf.required(config, "workflow"))
    check_study(config)
    from qflow.finish import finish
    from qflow.search.strategies import BudgetSpent
    from qflow.stages import begin
    from qflow.train_stage import train_nearest

    with assemble(config) as session:
        begin(session)
        try:
            workflow.run(session)
        except BudgetSpent as spent:
            session.console.say(f"{'budget':<12} {spent}")
        train_nearest(session)
        return finish(session)


def check_config(config: DictConfig) -> None:
    """Refuse what cannot work at any door before anything heavy is imported. Raises ConfigError."""
    from qflow.search.objective import Goal

    settings = conf.trial_settings(config)
    conf.sensitivity_settings(config)
    Goal(**conf.plain(config.objective))
    check_search(config)
    conf.check_executor(config)
    _check_loss(config, bool(settings.qat.steps))
    _check_float16(config, bool(settings.qconfig.float16_count))
    if config.task.batch_size < 1:
        raise ConfigError(f"task.batch_size is at least 1, but got {config.task.batch_size}.")


def check_study(config: DictConfig) -> None:
    """Refuse a search whose points cannot be trials; other doors have one qconfig and no points. Raises ConfigError."""
    check_config(config)
    space = conf.search_space(config)
    _check_loss(config, "qat.steps" in space)
    searched = sorted(key for key in space if key.startswith("qat."))
    if searched and config.qat.apply == "after_search":
        raise ConfigError(
            f"qat.apply=after_search leaves training out of the search, but got {searched[0]} to search. Use "
            f"qat.apply=every_trial, or take it out: search.space.{searched[0]}=null."
        )
    chosen = "fp16" in config.workflow or config.workflow == "full"
    _check_float16(config, chosen or "qconfig.float16_count" in space)
    for point in conf.plain(config.search.enqueue):
        conf.trial_settings(config, point)


def _check_loss(config: DictConfig, trains: bool) -> None:
    if trains and not conf.plain(config.qat.loss).get("_target_"):
        raise ConfigError(
            "QAT needs a loss, but got none. Set qat.loss._target_ to a function of (outputs, batch), or use qat=none."
        )


def _check_float16(config: DictConfig, chosen: bool) -> None:
    """Refuse to choose fp16 operators by errors that will not be measured. Raises ConfigError."""
    absent = [dtype for dtype in ("qint16", "float16") if dtype not in config.sensitivity.dtypes]
    if chosen and absent:
        raise ConfigError(
            f"Operators get fp16 by what they lose at int16 and at fp16, but got sensitivity.dtypes="
            f"{list(config.sensitivity.dtypes)} without {absent[0]}. Set sensitivity.dtypes=[qint8,qint16,float16]."
        )


def check_search(config: DictConfig) -> None:
    """Refuse a strategy, budgets and rates that cannot be. Raises ConfigError."""
    from qflow.search.strategies import STRATEGIES

    search = config.search
    if search.strategy not in STRATEGIES:
        raise ConfigError(f"search.strategy is one of {', '.join(STRATEGIES)}, but got {search.strategy!r}.")
    if search.max_evaluations is not None and search.max_evaluations < 1:
        raise ConfigError(
            f"search.max_evaluations is at least 1, but got {search.max_evaluations}. null sets no limit."
        )
    if not search.rates or not all(0.0 < rate <= 10.0 for rate in search.rates):
        raise ConfigError(f"search.rates holds learning rates above 0, but got {list(search.rates)}.")
    if not search.weight_decays or not all(0.0 <= decay <= 10.0 for decay in search.weight_decays):
        raise ConfigError(f"search.weight_decays holds numbers of at least 0, but got {list(search.weight_decays)}.")
    if not 0.0 < search.probe_share <= 1.0:
        raise ConfigError(f"search.probe_share lies above 0 and at most at 1, but got {search.probe_share:g}.")
    if search.sampler not in conf.SAMPLERS:
        known = ", ".join(conf.SAMPLERS)
        raise ConfigError(f"search.sampler is one of {known}, but got {search.sampler!r}.")
    if search.n_trials < 2:
        raise ConfigError(f"search.n_trials is at least 2 (all-int16 and all-int8), but got {search.n_trials}.")
    if search.timeout is not None and not 0 < search.timeout < math.inf:
        raise ConfigError(f"search.timeout is a number of seconds above 0, but got {search.timeout:g}.")


def find_workflow(name: str) -> Any:
    """The module workflows/<name>.py. Raises ConfigError listing those that exist."""
    folder = importlib.util.find_spec("qflow.workflows")
    places = list(folder.submodule_search_locations or []) if folder else []
    names = sorted(p.stem for place in places for p in Path(place).glob("[a-z]*.py") if p.stem != "train_float")
    if name not in names:
        raise ConfigError(f"A workflow is a file in workflows/, but got {name!r}. There are: {', '.join(names)}.")
    return importlib.import_module(f"qflow.workflows.{name}")


def make_bench(config: DictConfig) -> Bench:
    """Task, device rules and cost model as built from the configuration."""
    import torch

    from qflow.bench import Bench
    from qflow.core.device import DeviceRules
    from qflow.core.dtype import QDtype
    from qflow.cost.model import CostModel

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
    march = config.device.march
    return Bench(
        task=conf.build_task(config),
        rules=DeviceRules(march=march, oe_version=config.device.oe_version, **conf.plain(config.device.rules)),
        cost_model=CostModel(march=march, **conf.plain(config.device.cost)),
        sensitivity_settings=conf.sensitivity_settings(config),
        default_calibration=conf.trial_settings(config).calibration,
        eval_batch=config.task.batch_size,
        skip=tuple(config.quant.skip),
        training=conf.build_training(config),
        own_metric=own_metric(config),
        profile=config.device.profile,
        profile_dtype=QDtype.parse(config.device.profile_dtype, "device.profile_dtype"),
    )


def own_metric(config: DictConfig) -> Custom | None:
    """The user's metric for bad cases. Raises ConfigError."""
    from qflow.analysis.metrics import CUSTOM
    from qflow.analysis_arguments import custom_metric

    node = conf.sensitivity_settings(config).own_metric
    if not node["_target_"]:
        return None
    return custom_metric(CUSTOM, conf.get_function(node["_target_"], "sensitivity.own_metric"), node["order"])


def assemble(config: DictConfig) -> Any:
    """The session as a context: opens the store first (a bad one fails in seconds) and closes the study's run."""
    from contextlib import contextmanager

    from qflow.report.console import Console
    from qflow.search.objective import Goal
    from qflow.search.study import Study
    from qflow.session import Session
    from qflow.tracking.mlflow_tracker import MlflowTracker
    from qflow.trial import RUN_METRICS

    @contextmanager
    def opened() -> Any:
        root = conf.root_dir(config)
        tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment)
        bench = make_bench(config)
        accuracy = f"accuracy/{bench.task.metric_name}"
        goal = Goal(**conf.plain(config.objective)).aimed(accuracy, bench.task.direction, (accuracy, *RUN_METRICS))
        study = Study.open(
            root,
            config.study,
            space=conf.search_space(config),
            directions=tuple(goal.optimize.values()),
            sampler=config.search.sampler,
            seed=config.seed,
            n_trials=config.search.n_trials,
        )
        session = Session(config, bench, goal, Console(started=STARTED), tracker, study, root)
        bench.cache.folder, bench.cache.say = root / "cache", session.console.say
        bench.checkpoints, bench.searches = root / "cache" / "training", root / "cache" / "searches"
        status = "FAILED"
        try:
            with session.stack:
                yield session
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if session.study_run:
                tracker.close_study(session.study_run, status)

    return opened()


if __name__ == "__main__":
    main()
