"""A stored trial run again from its files alone, and every figure and file compared with what was stored.

Nothing is taken over but the sensitivity table, by which the trial chose its operators, and the input example. The same
configuration, weights, data and versions give the same bits on one kind of machine, so all comparisons are exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qflow.bundle.files import WEIGHTS
from qflow.bundle.stored import StoredTrial, config_of
from qflow.bundle.targets import check_targets
from qflow.config.executor_schema import MOST_THREADS
from qflow.config.settings import plain, trial_settings
from qflow.core.errors import BundleError, QflowError
from qflow.core.qconfig import QConfig
from qflow.core.record import sha256
from qflow.report.files import CALLS, CURVES, write_trial
from qflow.search.objective import Goal
from qflow.search.outcome import STOPPED
from qflow.study.assemble import make_evaluator
from qflow.study.checks import check_config
from qflow.study.manifest import manifest
from qflow.study.outcome import trial_metrics
from qflow.tracking.limits import rounded
from qflow.tracking.views import RANK
from qflow.trial.evaluator import Evaluator
from qflow.trial.record import TrialResult

PARTS = {"weights": "weights", "data": "data", "profile": "measured times", "graph": "operators", "engine": "engines"}
"""Entry of the manifest -> its name in words; they explain what differs further on, and are named first."""
APART = ("manifest.json", "config.yaml", "qconfig/scales.json", CALLS)
"""Files that are not compared by their bytes: what a rebuild starts from, scales (compared by name), and a log."""


@dataclass(frozen=True)
class Rebuilt:
    """The result of running a stored trial again, with its files in `folder`; None if it cannot be run."""

    trial: StoredTrial
    evaluator: Evaluator
    result: TrialResult | None
    figures: Mapping[str, tuple[float | None, float]]
    """Metric -> (stored, rebuilt)."""
    differences: tuple[str, ...]
    """Every difference from what was stored, in words; empty if there is none."""
    notes: tuple[str, ...] = ()
    """What was not compared."""


def rebuild(
    trial: StoredTrial,
    folder: Path,
    *,
    allow: Iterable[str] = (),
    own: Mapping[str, Any] | None = None,
    logged: Mapping[str, float] | None = None,
    begun: Callable[[Evaluator], None] = lambda _: None,
) -> Rebuilt:
    """Run `trial` again, write its files into `folder`, and compare them.

    `allow` are packages of the caller whose code may run, `own` is a configuration that the caller composed, whose
    `_target_`s may run too. `logged` are the metrics as the run shows them, with 6 digits. Raises BundleError for code
    that is not allowed, ConfigError or DataError if model and data cannot be built.
    """
    check_targets(config_of(trial), allow, own)
    check_config(trial.config)
    config = trial.config.copy()
    if not config.executor.threads:  # another number of threads sums in another order
        config.executor.threads = _threads(trial)
    evaluator = make_evaluator(config)
    evaluator.sensitivities = trial.sensitivities
    begun(evaluator)
    settings = trial_settings(config)
    found: list[str] = []
    try:
        found = differing_parts(manifest(evaluator), trial.manifest)
        evaluator.measure_float()
        with evaluator.repaired(settings.repair, settings.calibration):
            requested, applied = evaluator.resolve(settings.qconfig)
        found += _differing_qconfigs("requested", requested, trial.requested)
        result = evaluator.run_qconfig(requested, applied, settings)
        found += _differing_qconfigs("applied", result.qconfig, trial.qconfig)
    except QflowError as error:
        return Rebuilt(trial, evaluator, None, {}, (*found, f"the trial cannot be rebuilt: {error}"))
    now = {**manifest(evaluator), "example": trial.manifest.get("example", "")}
    text = (trial.folder / "config.yaml").read_text()
    write_trial(folder, result, config_yaml=text, manifest=now, sensitivities=trial.sensitivities)
    figures = _figures(result, evaluator, trial)
    found += _metrics(figures, trial, logged) + _scales(result, trial) + _files(folder, trial)
    more, notes = _more_metrics(figures, trial, logged or {})
    return Rebuilt(trial, evaluator, result, figures, (*found, *more), notes)


def _differing_qconfigs(name: str, ours: QConfig, stored: QConfig) -> list[str]:
    if ours.digest == stored.digest:
        return []
    names = ", ".join(list(ours.diff(stored))[:3])
    return [f"the configuration gives another {name} qconfig than the run holds: {names} differ"]


def _threads(trial: StoredTrial) -> int:
    threads = trial.manifest.get("threads", 0)
    if not isinstance(threads, int) or not 0 <= threads <= MOST_THREADS:
        raise BundleError(f"A manifest names 0 to {MOST_THREADS} threads, but got {threads!r:.40}. Take another run.")
    return threads


def differing_parts(now: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return in words which parts of two manifests differ."""
    return [
        f"{name} are not those of the run: {now.get(part) or 'none'} instead of {stored.get(part) or 'none'}"
        for part, name in PARTS.items()
        if (now.get(part) or "") != (stored.get(part) or "")
    ]


def _figures(result: TrialResult, evaluator: Evaluator, trial: StoredTrial) -> dict[str, tuple[float | None, float]]:
    """Return every metric as (stored, rebuilt)."""
    goal = Goal(**plain(trial.config.objective))
    found = trial_metrics(result, goal, f"accuracy/{evaluator.task.metric_name}")
    return {name: (trial.metrics.get(name), value) for name, value in found.items()}


def _metrics(
    figures: Mapping[str, tuple[float | None, float]], trial: StoredTrial, logged: Mapping[str, float] | None
) -> list[str]:
    found = [
        f"{name} was logged as {'nothing' if stored is None else f'{stored:.6g}'}, rebuilt it is {value:.6g}"
        for name, (stored, value) in figures.items()
        if stored is None or stored != value
    ]
    found += [f"{name} was logged, rebuilt there is none" for name in trial.metrics if name not in figures]
    for name, stored in trial.metrics.items() if logged is not None else ():
        value = (logged or {}).get(name, math.nan)
        if rounded(stored) != value:  # NaN differs from everything
            found.append(f"{name} of the run is {value:.6g}, its result holds {stored:.6g}")
    if STOPPED in trial.tags:
        found.append(f"the trial ended early ({trial.tags[STOPPED]}): its metric is a bound, not a measurement")
    return found


def _more_metrics(
    figures: Mapping[str, tuple[float | None, float]], trial: StoredTrial, logged: Mapping[str, float]
) -> tuple[list[str], tuple[str, ...]]:
    """Return the differences and the notes for metrics of the run that the result of the trial has not.

    Users may add figures of their own to a run, as of a board; these are noted. Those that are named as qflow's, or are
    no finite numbers, are differences. The study adds a rank, and a training its curves.
    """
    groups = {name.partition("/")[0] for name in figures}
    known = {name for name in (RANK, *(CURVES if trial.trained else ())) if math.isfinite(logged.get(name, 0.0))}
    more = sorted(logged.keys() - trial.metrics.keys() - known)
    own = [name for name in more if name.partition("/")[0] in groups or not math.isfinite(logged[name])]
    found = [f"{name} of the run is {logged[name]:.6g}, its result has none" for name in own]
    others = [name for name in more if name not in own]
    return found, (f"not of the trial's result, and not compared: {', '.join(others)}",) if others else ()


def _scales(result: TrialResult, trial: StoredTrial) -> list[str]:
    ours, stored = json.loads(json.dumps(result.scales)), trial.scales
    names = [name for name in sorted({*ours, *stored}) if ours.get(name) != stored.get(name)]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"the calibrated scales differ from those of the run at {names[0]}{more}: other data, weights or versions"]


def _files(folder: Path, trial: StoredTrial) -> list[str]:
    """Files of the rebuilt trial that are not, byte for byte, those of the stored one; scales are named before."""
    ours = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    found = []
    for name in sorted({*ours, *trial.files}):
        if name in APART:
            continue
        if name not in ours or name not in trial.files:
            if not (name == WEIGHTS and not trial.trained and name in trial.files):  # of a registered version
                found.append(f"{name} is {'not rebuilt' if name in trial.files else 'not stored'}")
        elif name == "training.json":
            if _without_seconds(ours[name]) != _without_seconds(trial.folder / name):
                found.append(f"{name} differs from the stored one: the training took another course")
        elif sha256(ours[name]) != trial.files[name]:
            found.append(f"{name} differs from the stored one")
    return found


def _without_seconds(path: Path) -> dict[str, Any]:
    return {**json.loads(path.read_text()), "seconds": 0.0}
