"""One trial of a configuration: evaluated, written as files, and its numbers as outcome."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qflow.bundle.files import digests, files_digest
from qflow.config.settings import resolved_yaml, trial_settings
from qflow.report.console import Console
from qflow.report.files import write_trial
from qflow.search.objective import Goal
from qflow.search.outcome import Outcome
from qflow.study.outcome import outcome, switches, trial_params
from qflow.trial.evaluator import Evaluator


def evaluate_trial(
    config: DictConfig,
    evaluator: Evaluator,
    goal: Goal,
    manifest: Mapping[str, Any],
    folder: Path,
    console: Console,
    params: Mapping[str, Any] | None = None,
) -> Outcome:
    """Evaluate the settings of `config`, write the trial's files into `folder` and return its numbers.

    `params` are the searched values that `config` holds; modules among them become params of the MLflow run.
    """
    with console.bar("trial", evaluator.eval_samples, "samples") as advance:
        result = evaluator.run_trial(trial_settings(config), advance)
    for text in evaluator.engine.news():
        console.say(f"{'engine':<12} {text}")
    write_trial(
        folder,
        result,
        config_yaml=resolved_yaml(config),
        manifest=manifest,
        sensitivities=evaluator.sensitivities,
    )
    named = {**trial_params(config), **switches(params or {})}
    accuracy, files = f"accuracy/{evaluator.task.metric_name}", files_digest(digests(folder))
    return outcome(result, goal, accuracy, named, evaluator.eval_samples, files)
