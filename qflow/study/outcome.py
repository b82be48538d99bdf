"""One evaluated trial as outcome for the search and MLflow, and as line for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from qflow.bundle.files import DIGEST
from qflow.config.settings import owner, plain
from qflow.search.objective import Goal, meets
from qflow.search.outcome import FailedTrial, FinishedTrial, Outcome
from qflow.tracking.limits import param_name
from qflow.trial.record import TrialResult, run_metrics

STOPPED = "qflow.stopped"  # tag of a trial that ended early: its metric is the worst possible one


def trial_params(config: DictConfig) -> dict[str, Any]:
    """Return the scalar settings of a trial for MLflow; without int16_ratio if another rule chooses int16."""
    node = {"calibration": plain(config.calibration), "qconfig": plain(config.qconfig)}
    if config.qconfig.assignment or config.qconfig.error_share is not None:
        del node["qconfig"]["int16_ratio"]
    if config.qat.steps:
        node["qat"] = plain(config.qat)
    return {
        f"{group}.{key}": value
        for group, values in node.items()
        for key, value in values.items()
        if isinstance(value, (str, int, float, bool))
    }


def switches(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the searched modules under names that MLflow allows: `[add](1)` becomes `_add__1_`."""
    return {param_name(key): value for key, value in params.items() if owner(key)}


def outcome(
    result: TrialResult, goal: Goal, accuracy: str, params: Mapping[str, Any], samples: int, files: str = ""
) -> Outcome:
    """Return what the search and MLflow store of a trial.

    `samples` is the number of samples of a full evaluation, `files` the digest over the files of the trial.
    """
    cost, metrics = result.cost, run_metrics(result, accuracy)
    return Outcome(
        objectives=goal.objectives(metrics),
        constraints=goal.constraints(metrics),
        params=params,
        metrics=metrics,
        tags={
            **({"qflow.cost_refusal": cost.refusal} if cost.refusal else {}),
            **({STOPPED: f"after {result.samples} of {samples} samples"} if result.samples < samples else {}),
            "qflow.qconfig": result.qconfig.digest,
            "qflow.scales": result.scales_digest,
            **({DIGEST: files} if files else {}),
            "qflow.evaluated": str(result.evaluated).lower(),
        },
    )


def trial_line(trial: FinishedTrial | FailedTrial, accuracy: str) -> str:
    """Return the console line of a trial."""
    name = f"trial {trial.number} {trial.label}".strip()
    if isinstance(trial, FailedTrial):
        return f"{name:<24} failed: {trial.reason}"
    m, p = trial.outcome.metrics, trial.outcome.params
    verdict = "meets" if meets(trial) else "misses"
    amount = f"{p['calibration.batch_size']}x{p['calibration.steps']}"
    stopped = f"  stopped {t}: at worst" if (t := trial.outcome.tags.get(STOPPED)) else ""
    weights = f"  int16 weights {count:.0f}" if (count := m.get("qconfig/n_int16_weights")) else ""
    trained = f"  QAT {m['qat/steps']:.0f} steps" if "qat/steps" in m else ""
    return (
        f"{name:<24} {m[accuracy]:.4f} drop {m['accuracy/drop']:+.4f} {m['cost/latency_ms']:7.3f} ms  int16 "
        f"{m['qconfig/int16_ratio']:.2f}  {p['calibration.method']:<10} {amount:<7} {verdict:<6} {trial.seconds:5.1f} s"
        f"{weights}{trained}{stopped}"
    )
