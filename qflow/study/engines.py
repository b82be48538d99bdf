"""A stored trial on qflow's engine and on the plugin's, which `compare --engine` shows."""

from __future__ import annotations

from collections.abc import Iterable

from qflow.bundle.stored import StoredTrial, config_of
from qflow.bundle.targets import check_targets
from qflow.config.settings import trial_settings
from qflow.core.engine import EngineName
from qflow.core.errors import ConfigError
from qflow.plugin.comparison import EngineComparison, compare_engines
from qflow.study.assemble import make_engine, make_evaluator
from qflow.study.checks import check_config


def on_two_engines(trial: StoredTrial, allow: Iterable[str] = ()) -> EngineComparison:
    """Calibrate and evaluate `trial` with both engines. `allow` are packages of the caller whose code may run.

    Raises ConfigError without an installed plugin, or for a trial that was trained: the plugin calibrates. Raises
    BundleError for code that is not allowed.
    """
    check_targets(config_of(trial), allow)
    check_config(trial.config)
    if trial.trained:
        raise ConfigError(f"Engines are compared by calibration alone, but got a trained trial: {trial.source}.")
    config = trial.config.copy()
    engines = [make_engine(name) for name in EngineName]
    config.engine = EngineName.qflow.value
    evaluator, settings = make_evaluator(config), trial_settings(config)
    evaluator.sensitivities = trial.sensitivities
    evaluator.measure_float()
    for engine in engines:
        engine.check(evaluator, settings)
    with evaluator.repaired(settings.repair, settings.calibration):
        requested, applied = evaluator.resolve(settings.qconfig)
        return compare_engines(evaluator, requested, applied, settings.calibration, engines)
