"""The learning rate of the training stage, from short trainings.

The configured rate comes first, then those of `search.rates`, the nearest to it first; a rate that meets the goal needs
no rival. The drops of short trainings differ by a few samples, so among the rates whose drops are within the noise of
the least one (paired by sample), the losses of the second half of the steps decide: all rates see the same batches in
the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from omegaconf import DictConfig

from qflow.core.temporary import TemporaryFolder
from qflow.search.noise import Margin
from qflow.search.objective import meets
from qflow.search.outcome import FinishedTrial
from qflow.study.kept import run_of
from qflow.study.paired import paired_noise
from qflow.study.run_files import RunFiles
from qflow.study.session import Session

Measure: TypeAlias = Callable[[Mapping[str, Any], str], FinishedTrial | None]


def rates(config: DictConfig) -> list[float]:
    """Return the rates to try, in order. A configured rate of 0 is not among them."""
    start = config.qat.learning_rate
    known = dict.fromkeys([*([start] if start else []), *config.search.rates])
    return sorted(known, key=lambda rate: abs(math.log(rate / start)) if start else rate)


def find_rate(session: Session, measure: Measure, point: Mapping[str, Any], steps: int) -> FinishedTrial | None:
    """Train at `point` for `steps` with rates in turn; return the trial with the chosen one, None if all fail."""
    trials: dict[float, FinishedTrial | None] = {}
    for rate in rates(session.config):
        trials[rate] = measure({**point, "qat.steps": steps, "qat.learning_rate": rate}, f"QAT rate {rate:g}")
        if meets(trials[rate]):
            break
    known = {rate: trial for rate, trial in trials.items() if trial is not None}
    if not known:
        session.decide("learning rate", f"every rate of {[*trials]} fails; add lower rates to search.rates")
        return None
    met = next((rate for rate, trial in known.items() if meets(trial)), None)
    rate, why = (met, "meets the goal") if met is not None else _least(session, known)
    drops = {r: f"{_drop(trial):+.4f}" if trial else "failed" for r, trial in trials.items()}
    by_rate = ", ".join(f"{r:g}: {drop}" for r, drop in drops.items())
    session.decide("learning rate", f"{rate:g} {why} after {steps} steps (drop by rate {by_rate})")
    return known[rate]


def _least(session: Session, known: Mapping[float, FinishedTrial]) -> tuple[float, str]:
    """Return the rate with the least drop, or the least loss where drops do not differ, and why, as words after it."""
    best = min(known, key=lambda r: (_drop(known[r]), r))
    gaps = {
        r: Margin(_drop(trial) - _drop(known[best]), paired_noise(session, known[best], trial))
        for r, trial in known.items()
        if r != best
    }
    losses = {best: _loss(session, known[best])} | {r: _loss(session, known[r]) for r in alike(gaps)}
    if len(losses) == 1:
        return best, "is best"
    rate = min(losses, key=lambda r: (losses[r], r))
    named = ", ".join(f"{r:g}: {losses[r]:.4g}" for r in losses)
    noise = "; ".join(f"{r:g} {gaps[r]}" for r in losses if r != best)
    return rate, f"has the least training loss ({named}) of those within the noise of the least drop ({noise})"


def alike(gaps: Mapping[float, Margin]) -> list[float]:
    """Return the rates whose drop exceeds the least one by no more than the noise; none where that is not known."""
    return [rate for rate, gap in gaps.items() if gap.noise.known and not gap.sure]


def _drop(trial: FinishedTrial) -> float:
    return trial.outcome.metrics["accuracy/drop"]


def _loss(session: Session, trial: FinishedTrial) -> float:
    """Return the mean loss of the second half of the steps of a trial."""
    with TemporaryFolder() as folder:
        losses = RunFiles(session.tracker, Path(folder)).json(run_of(session, trial), "training.json")["losses"]
    return fmean(losses[len(losses) // 2 :])
