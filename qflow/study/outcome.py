"""One evaluated trial as outcome for the search and MLflow, and as line for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from qflow.bundle.files import DIGEST
from qflow.config.settings import owner, plain, trial_settings
from qflow.core.agreement import meaning
from qflow.core.dtype import QDtype
from qflow.core.names import trial_name
from qflow.search.objective import Goal, meets
from qflow.search.outcome import STOPPED, FailedTrial, FinishedTrial, Outcome
from qflow.tracking.limits import NOTE, param_name
from qflow.tracking.views import MEETS
from qflow.trial.record import TrialResult, run_metrics

NAMED = 12  # operators that a description names for each dtype


def trial_params(config: DictConfig) -> dict[str, Any]:
    """Return the scalar settings of a trial for MLflow; without int16_ratio if another rule chooses int16.

    `qconfig.modules` is one text, with the operators' own names.
    """
    node = {"calibration": plain(config.calibration), "qconfig": plain(config.qconfig)}
    if config.qconfig.assignment or config.qconfig.error_share is not None:
        del node["qconfig"]["int16_ratio"]
    node["qconfig"]["modules"] = ", ".join(f"{name}: {spec}" for name, spec in plain(config.qconfig.modules).items())
    if config.qat.steps:
        node["qat"] = plain(config.qat)
    if trial_settings(config).repair.steps:
        node["repair"] = plain(config.repair)
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
    cost, metrics = result.cost, trial_metrics(result, goal, accuracy)
    return Outcome(
        objectives=goal.objectives(metrics),
        constraints=goal.constraints(metrics),
        params=params,
        metrics=metrics,
        tags={
            NOTE: description(result, goal, accuracy, bool(metrics[MEETS])),
            **({"qflow.cost_refusal": cost.refusal} if cost.refusal else {}),
            **({STOPPED: f"after {result.samples} of {samples} samples"} if result.samples < samples else {}),
            "qflow.qconfig": result.qconfig.digest,
            "qflow.scales": result.scales_digest,
            **({DIGEST: files} if files else {}),
            "qflow.evaluated": str(result.evaluated).lower(),
        },
    )


def trial_metrics(result: TrialResult, goal: Goal, accuracy: str) -> dict[str, float]:
    """Return the metrics of a trial's run, with 1 or 0 for whether it meets the goal."""
    metrics = run_metrics(result, accuracy)
    met = all(excess <= 0.0 for excess in goal.constraints(metrics).values())
    return {**metrics, MEETS: float(met)}


def description(result: TrialResult, goal: Goal, accuracy: str, met: bool) -> str:
    """Return the trial in Markdown, for its page in MLflow: what it reaches, what it costs, what it promotes."""
    cost, count = result.cost, len(result.qconfig.ops)
    verdict = "meets" if met else "misses"
    text = meaning(accuracy.partition("/")[2])
    lines = [
        *([f"{text}."] if text else []),
        f"{accuracy.partition('/')[2]} {result.metric:.4f}, drop {result.drop:+.4f}: {verdict} the goal ({goal}).",
        f"Predicted latency {cost.latency_ms:.3f} ms [{cost.low_ms:.2f}, {cost.high_ms:.2f}] on {cost.march}.",
    ]
    if result.training is not None and result.training.losses:
        losses = result.training.losses
        lines.append(f"Trained for {result.training.steps} steps: loss {losses[0]:.4g} to {losses[-1]:.4g}.")
    promoted = {
        "float16": result.qconfig.names(QDtype.float16),
        "int16": result.qconfig.names(QDtype.qint16),
        "int16 weights": result.qconfig.weights(QDtype.qint16),
    }
    for what, names in promoted.items():
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            shown = ", ".join(f"`{name}`" for name in names[:NAMED])
            lines.append(f"{what}: {len(names)} of {count} operators, {shown}{more}.")
    return "\n\n".join(lines)


def trial_line(trial: FinishedTrial | FailedTrial, accuracy: str) -> str:
    """Return the console line of a trial."""
    name = trial_name(trial.number, trial.label)
    if isinstance(trial, FailedTrial):
        return f"{name:<24} failed: {trial.reason}"
    m, p = trial.outcome.metrics, trial.outcome.params
    verdict = "meets" if meets(trial) else "misses"
    amount = f"{p['calibration.batch_size']}x{p['calibration.steps']}"
    stopped = f"  stopped {t}: at worst" if (t := trial.stopped) else ""
    weights = f"  int16 weights {count:.0f}" if (count := m.get("qconfig/n_int16_weights")) else ""
    trained = f"  QAT {m['qat/steps']:.0f} steps" if "qat/steps" in m else ""
    return (
        f"{name:<24} {_shown(m, accuracy)} drop {m['accuracy/drop']:+.4f} {m['cost/latency_ms']:7.3f} ms  int16 "
        f"{m['qconfig/int16_ratio']:.2f}  {p['calibration.method']:<10} {amount:<7} {verdict:<6} {trial.seconds:5.1f} s"
        f"{weights}{trained}{stopped}"
    )


def _shown(metrics: Mapping[str, float], accuracy: str) -> str:
    return f"{metrics[accuracy]:.4f}{' agreement,' if meaning(accuracy.partition('/')[2]) else ''}"


def best_line(best: FinishedTrial | None, accuracy: str) -> str:
    """Return what the progress bars say of the best trial so far; `accuracy` is the metric on its run."""
    if best is None:
        return "best: none meets the goal yet"
    m = best.outcome.metrics
    return (
        f"best: {_shown(m, accuracy)} drop {m['accuracy/drop']:+.4f} {m['cost/latency_ms']:.3f} ms "
        f"int16 {m['qconfig/int16_ratio']:.2f}"
    )
