"""What a trial costs beyond its calibration and evaluation: the kill-safe loop on a real store, on shipped tasks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.planted import NASH_M
from qflow.bench import Bench
from qflow.core.settings import CalibrationSettings, QConfigSettings, TrialSettings
from qflow.cost.model import CostModel
from qflow.manifest import manifest
from qflow.quant.calibrate import CalibrationStats
from qflow.report.files import write_trial
from qflow.search.domain import Interval, Range, Space, Values
from qflow.search.loop import driving
from qflow.search.objective import Goal
from qflow.search.outcome import Outcome
from qflow.search.study import Study
from qflow.tasks import digits
from qflow.tasks.perception import data as perception_data
from qflow.tasks.perception import metric as perception_metric
from qflow.tasks.perception import model as perception_model
from qflow.tasks.task import Task, make_task
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.trial import Evaluation, run_metrics

SPACE: Space = {"qconfig.int16_ratio": Range(0.05, 0.95, 0.05), "calibration.percentile": Interval(99.9, 100.0)}
GOAL = Goal(max_drop=0.01)
CONFIG = "".join(f"setting_{i}: value\n" for i in range(120))  # about what a resolved configuration takes


def perception_task(evaluation: int) -> Task:
    return make_task(
        name="perception",
        model=perception_model.build_model(),
        data=perception_data.build_data(calibration_size=256, evaluation_size=evaluation),
        metric=perception_metric.Found(),
        deploy_shape=(1, 3, 384, 640),
    )


def digits_task(evaluation: int) -> Task:
    data = digits.build_data(calibration_size=256)
    return make_task(name="digits", model=digits.build_model(), data=data, metric=digits.Accuracy())


TASKS: dict[str, tuple[Callable[[int], Task], int]] = {
    "perception": (perception_task, 1536),
    "digits": (digits_task, 0),
}


class Clock(Bench):
    """A bench that keeps the wall time within calibration passes and evaluations."""

    inside = 0.0

    def calibrate(self, *arguments: Any, **options: Any) -> CalibrationStats:
        return self._timed(super().calibrate, *arguments, **options)

    def _evaluated(self, *arguments: Any) -> Evaluation:
        return self._timed(super()._evaluated, *arguments)

    def _timed(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            self.inside += time.perf_counter() - start


def overhead(name: str, n_trials: int, evaluation: int | None = None) -> list[str]:
    """Cells: task, trials, median s a trial, of it calibration and evaluation, the bench, loop with study and store."""
    build, size = TASKS[name]
    calibration = CalibrationSettings(method="percentile")
    bench = Clock(build(evaluation or size), NASH_M, CostModel(), default_calibration=calibration, eval_batch=64)
    accuracy = f"accuracy/{bench.task.metric_name}"
    bench.measure_float()
    bench.rank()
    fixed = manifest(bench)
    walls, insides, benches = [], [], []

    def evaluate(params: Values, folder: Path) -> Outcome:
        start = time.perf_counter()
        settings = TrialSettings(
            qconfig=QConfigSettings(int16_ratio=float(params["qconfig.int16_ratio"])),
            calibration=CalibrationSettings(method="percentile", percentile=float(params["calibration.percentile"])),
        )
        result = bench.run_trial(settings)
        benches.append(time.perf_counter() - start)
        write_trial(folder, result, config_yaml=CONFIG, manifest=fixed, sensitivities=bench.sensitivities)
        metrics = run_metrics(result, accuracy)
        return Outcome((result.metric, result.cost.latency_ms), GOAL.constraints(metrics), dict(params), metrics)

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        tracker = MlflowTracker.open(None, folder, "benchmark")
        study = Study.open(folder, "search/overhead", space=SPACE, directions=("maximize", "minimize"))
        with driving(study, tracker, evaluate, scratch=folder / "scratch") as driver:
            driver.sample()  # the store warms up
            benches.clear()
            for _ in range(n_trials):
                start, before = time.perf_counter(), bench.inside
                driver.sample()
                walls.append(time.perf_counter() - start)
                insides.append(bench.inside - before)
    shares = sorted((wall - inside) / wall for wall, inside in zip(walls, insides, strict=True))
    extra = [wall - inside for wall, inside in zip(walls, insides, strict=True)]
    own = [spent - inside for spent, inside in zip(benches, insides, strict=True)]
    loop = [wall - spent for wall, spent in zip(walls, benches, strict=True)]
    return [
        name,
        str(len(walls)),
        f"{statistics.median(walls):.2f} s",
        f"{statistics.median(insides):.2f} s",
        f"{statistics.median(own) * 1e3:.0f} ms",
        f"{statistics.median(loop) * 1e3:.0f} ms",
        f"{statistics.median(extra) * 1e3:.0f} ms",
        f"{statistics.median(shares):.1%} ({shares[0]:.1%} to {shares[-1]:.1%})",
    ]
