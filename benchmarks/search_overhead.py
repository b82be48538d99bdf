"""Time of a trial beyond its calibration and evaluation, in a study as `qflow.tune` runs it, on the built-in tasks."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hydra import compose, initialize_config_dir

from qflow.config.command_schema import register_schema
from qflow.config.keys import conf_dir
from qflow.config.overrides import rewrite
from qflow.study.baselines import ALL_INT8, ALL_INT16, baseline
from qflow.study.stages import begin
from qflow.study.start import open_session
from qflow.trial.evaluator import Evaluator

SPACE = [
    "search.sampler=random",
    "search.space.calibration.percentile=interval(99.9,100)",
    "calibration.method=percentile",
]


class Clock:
    """Seconds spent in calibration passes and evaluations (`used`: of processor time), and in the whole evaluator."""

    def __init__(self) -> None:
        self.inside = self.used = self.evaluator = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the evaluator's methods inside the context."""
        with (
            patch.object(Evaluator, "calibrate", self._timed(Evaluator.calibrate, "inside")),
            patch.object(Evaluator, "_evaluated", self._timed(Evaluator._evaluated, "inside")),
            patch.object(Evaluator, "run_trial", self._timed(Evaluator.run_trial, "evaluator")),
        ):
            yield

    def _timed(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            start, used = time.perf_counter(), time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                setattr(self, what, getattr(self, what) + time.perf_counter() - start)
                self.used += time.process_time() - used if what == "inside" else 0.0

        return timed


def overhead(name: str, n_trials: int) -> list[str]:
    """Cells of one task: its name, trials, median time of a trial, of its calibration and evaluation, of the rest of
    the evaluator, of the loop with study and store, of the last two together, their share, and their processor time,
    which other programs disturb less.
    """
    register_schema("tune")
    clock, taken = Clock(), []
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(conf_dir()), version_base="1.3"):
        arguments = ["+experiment=int8_int16", f"task={name}", f"root={folder}", "executor.threads=1", *SPACE]
        config = compose("tune", overrides=rewrite([*arguments, f"search.n_trials={n_trials + 2}"]))
        with open_session(config, time.perf_counter()) as session, clock.running():
            begin(session)
            for label in (ALL_INT16, ALL_INT8):  # these also warm up the store
                baseline(session, label)
            for _ in range(n_trials):
                before = time.perf_counter(), clock.inside, clock.evaluator, time.process_time(), clock.used
                session.sample()
                now = time.perf_counter(), clock.inside, clock.evaluator, time.process_time(), clock.used
                taken.append([b - a for a, b in zip(before, now, strict=True)])
    shares = sorted((wall - inside) / wall for wall, inside, *_ in taken)
    return [
        name,
        str(len(taken)),
        f"{statistics.median(wall for wall, *_ in taken):.2f} s",
        f"{statistics.median(inside for _, inside, *_ in taken):.2f} s",
        f"{statistics.median(evaluator - inside for _, inside, evaluator, *_ in taken) * 1e3:.0f} ms",
        f"{statistics.median(wall - evaluator for wall, _, evaluator, *_ in taken) * 1e3:.0f} ms",
        f"{statistics.median(wall - inside for wall, inside, *_ in taken) * 1e3:.0f} ms",
        f"{statistics.median(shares):.1%} ({shares[0]:.1%} to {shares[-1]:.1%})",
        f"{statistics.median(used - inside for *_, used, inside in taken) * 1e3:.0f} ms",
    ]
