"""One study on one store, with a count of the evaluations."""

from __future__ import annotations

from pathlib import Path

from qflow.search.domain import Choice, Interval
from qflow.search.loop import run_trials
from qflow.search.outcome import FailedTrial, FinishedTrial, Outcome
from qflow.search.reconcile import check_invariants
from qflow.search.study import Study
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.patience import Patience

SPACE = {"int16_ratio": Interval(0, 1), "method": Choice(("kl", "mse"))}


FIXED = [("all-int8", {"int16_ratio": 0.0}), ("all-int16", {"int16_ratio": 1.0})]


def outcome(params, **changes) -> Outcome:
    ratio = params["int16_ratio"]
    values = {
        "objectives": (0.7 + 0.1 * ratio, 1 + ratio),
        "constraints": {"drop": 0.5 - ratio},
        "params": dict(params),
        "metrics": {"accuracy/drop": 0.1 - 0.1 * ratio, "cost/latency_ms": 1 + ratio},
    }
    return Outcome(**{**values, **changes})


class Harness:
    """One study on one store, with a count of the evaluations."""

    def __init__(
        self, store: Path, space=SPACE, name: str = "task/stage", sampler: str = "random", uri: str | None = None,
        patience: Patience | None = None,
    ) -> None:  # fmt: skip
        self.store = store
        self.tracker = MlflowTracker.open(uri, store, "experiment", patience)
        self.study = Study.open(
            store, name, space=space, directions=("maximize", "minimize"), sampler=sampler, n_trials=8
        )
        self.evaluated: list[dict] = []
        self.seen: list[FinishedTrial | FailedTrial] = []

    def evaluate(self, params, folder: Path) -> Outcome:
        self.evaluated.append(dict(params))
        (folder / "qconfig.json").write_text("{}")
        return outcome(params)

    def run(self, n_trials: int, evaluate=None, **options) -> list[FinishedTrial]:
        options = {"fixed": FIXED, "scratch": self.store / "scratch", "on_trial": self.seen.append, **options}
        return run_trials(self.study, self.tracker, evaluate or self.evaluate, n_trials=n_trials, **options)

    def problems(self) -> list[str]:
        return check_invariants(self.study, self.tracker)

    def run_status(self, number: int) -> str:
        return next(s for _, n, s, _ in self.tracker.trial_runs(self.study.name) if n == number)
