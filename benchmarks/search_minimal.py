"""Searches for the fewest promotions with a drop of at most 1 point, in ResNet-20 with planted damage (planted.py)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.networks import ResNet
from benchmarks.planted import CALIBRATION, EVALUATION, NASH_M, pictures, planted_resnet, task, train
from qflow.core.dtype import QDtype
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.cost_model.model import CostModel
from qflow.search.cost_terms import CostTerms
from qflow.search.objective import MAXIMIZE, MINIMIZE, Goal, best_trial
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, assign, raise_until_met
from qflow.trial.evaluator import Evaluator
from qflow.trial.record import Evaluation, TrialResult, run_metrics

FEWEST = "qconfig/n_int16"
GOAL = Goal(max_drop=0.01, optimize={"accuracy/accuracy": MAXIMIZE, FEWEST: MINIMIZE})
FREE_ADDS = replace(NASH_M, fused_add_int8=False)
"""nash-m without its rule that an add fused into a convolution reads int8, which holds all planted outputs at int8."""
DEPLOYED = (1, 3, 224, 224)
EPOCHS = 8

PEERS = (
    ("ModelOpt gradient, loop over budgets", "8.9 + 21.1 = 30", "5", "6 layers"),
    ("NNCF accuracy control", "36.8", "4", "4 operators, to fp32"),
    ("AIMET AMP, accuracy score", "149", "13", "5 quantizers"),
    ("MCT ILP on BOPs", "166", "1", "not counted"),
    ("plain loop on a gradient ranking (no tool)", "5.2 + 10.0 = 15", "4", "3"),
)
"""Tool, FFE of everything, evaluations, promoted operators; measured earlier on a network made in the same way."""


class Clock(Evaluator):
    """An evaluator that sums up the CPU time of its evaluations."""

    evaluating = 0.0

    def _evaluated(self, *arguments: Any) -> Evaluation:
        start = time.process_time()
        try:
            return super()._evaluated(*arguments)
        finally:
            self.evaluating += time.process_time() - start


@dataclass
class Search:
    """A search with its evaluator, its trials, and CPU seconds by stage."""

    evaluator: Clock
    seconds: dict[str, float] = field(default_factory=dict)
    trials: dict[str, tuple[FinishedTrial, TrialResult]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Any:
        start, before = time.process_time(), self.evaluator.evaluating
        yield
        spent = time.process_time() - start - (self.evaluator.evaluating - before)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent

    def measure(self, point: Any, label: str = "") -> FinishedTrial:
        key = str(sorted(point.items()))
        if key not in self.trials:
            settings = {name.split(".")[1]: value for name, value in point.items()}
            result = self.evaluator.run_trial(TrialSettings(qconfig=QConfigSettings(**settings)))
            metrics = run_metrics(result, "accuracy/accuracy")
            outcome = Outcome((result.metric, metrics[FEWEST]), GOAL.constraints(metrics), point, metrics)
            self.trials[key] = FinishedTrial(len(self.trials), "", point, label, outcome, 0.0), result
        return self.trials[key][0]

    @property
    def best(self) -> TrialResult | None:
        """The trial with the fewest int16 operators that meets the goal."""
        best = best_trial([trial for trial, _ in self.trials.values()], GOAL.ranking)
        return next((result for trial, result in self.trials.values() if trial is best), None)


def by_ratio(search: Search) -> None:
    count = len(search.evaluator.precisions.promotable)
    raise_until_met(search.measure, {}, "qconfig.int16_ratio", [k / count for k in range(count + 1)])


def by_assign(search: Search) -> None:
    problem = search.evaluator.precisions.problem(QConfigSettings())
    count = CostTerms(lambda mix: mix.count("6"), 0.0, {(o.place,): 1.0 for o in problem.operators})
    problem = replace(problem, time=count)  # as the other tools do; by time, all int16 is the best mix here
    drop8, drop16 = (
        search.measure({ASSIGNMENT: mix}).outcome.metrics["accuracy/drop"]
        for mix in (problem.all_int8, problem.all_int16)
    )
    assign(
        search.measure,
        {},
        problem,
        max_drop=GOAL.max_drop,
        int8_drop=drop8,
        int16_drop=drop16,
        explore=False,
    )


STRATEGIES: dict[str, Callable[[Search], None]] = {"ratio": by_ratio, "assign": by_assign}


def trained(folder: Path, seed: int, data: TensorDataset, epochs: int = EPOCHS) -> nn.Module:
    """ResNet-20, trained once for each seed in about a minute and kept in `folder`."""
    path = folder / f"resnet20-{seed}-{epochs}.pt"
    model = ResNet()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = train(ResNet, data, epochs=epochs, rate=4e-3, seed=seed)  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def float_seconds(model: nn.Module, images: torch.Tensor) -> float:
    """CPU time of one float forward pass over the calibration set: the unit FFE."""
    with torch.no_grad():
        start = time.process_time()
        for batch in images.split(64):
            model(batch)
        return time.process_time() - start


def search_once(
    model: nn.Module, planted: list[str], data: TensorDataset, name: str, evaluation: int
) -> dict[str, Any]:
    """Run one strategy from start to end and time each stage; float forward passes before and after give the unit."""
    made = task("planted", model, data, DEPLOYED, evaluation)
    images = made.data.calibration.tensors[0]
    unit = [float_seconds(model, images) for _ in range(3)]
    evaluator = Clock(
        made,
        FREE_ADDS,
        CostModel(),
        sensitivity_settings=SensitivitySettings(),
        default_calibration=CalibrationSettings(batch_size=16, steps=CALIBRATION // 16),
        eval_batch=64,
    )
    search = Search(evaluator)
    start = time.process_time()
    evaluator.measure_float()
    float_s = time.process_time() - start
    with search.stage("trace"):
        evaluator.prepare()
    with search.stage("calibrate"):
        evaluator.calibrate(evaluator.default_calibration)
    with search.stage("bad cases"):
        evaluator.find_badcases()
    with search.stage("rank"):
        evaluator.rank()
    with search.stage("search"):
        both = [search.measure({"qconfig.int16_ratio": ratio}) for ratio in (1.0, 0.0)]
        STRATEGIES[name](search)
    unit += [float_seconds(model, images) for _ in range(3)]
    ffe = statistics.median(unit)
    best = search.best
    promoted = best.qconfig.names(QDtype.qint16) if best else ()
    return {
        "int16": both[0].outcome.metrics["accuracy/drop"],
        "int8": both[1].outcome.metrics["accuracy/drop"],
        "drop": best.drop if best else float("nan"),
        "promoted": promoted,
        "exact": sorted(promoted) == sorted(planted),
        "ms": [*(t.outcome.metrics["cost/latency_ms"] for t in both), best.cost.latency_ms if best else float("nan")],
        "unit": ffe,
        "evaluations": evaluator.evaluations,
        "stages": {stage: spent / ffe for stage, spent in search.seconds.items()},
        "overhead": sum(search.seconds.values()) / ffe,
        "evaluating": evaluator.evaluating / ffe,
        "float": float_s / ffe,
    }


def minimal(
    folder: Path, seeds: list[int], *, epochs: int = EPOCHS, evaluation: int = EVALUATION, side: int = 32
) -> list[str]:
    """Lines of the tables; each seed stands for a training and a draw of the rescaled channels."""
    data = pictures(side, 3)
    lines = []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in STRATEGIES}
    for seed in seeds:
        model = trained(folder, seed, data, epochs)
        calibration = data.tensors[0][EVALUATION : EVALUATION + CALIBRATION]
        planted, damaged = planted_resnet(model, calibration, seed)  # type: ignore[arg-type]
        with torch.no_grad():
            change = float((planted(calibration[:64]) - model(calibration[:64])).abs().max())
        for name in STRATEGIES:
            run = search_once(planted, damaged, data, name, evaluation)
            found[name].append(run)
            stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in run["stages"].items())
            lines.append(
                f"| {seed} | {name} | {run['int8']:.3f} / {run['int16']:.3f} / {run['drop']:.3f} | "
                f"{' / '.join(f'{ms:.3f}' for ms in reversed(run['ms']))} | "
                f"{'the 3 planted' if run['exact'] else ', '.join(run['promoted']) or 'goal missed'} | "
                f"{run['evaluations']} | {run['overhead']:.1f} ({stages}) | {run['evaluating']:.1f} | "
                f"{run['overhead'] + run['evaluating']:.1f} | {change:.0e} | {run['unit']:.2f} s |"
            )
    columns = ["seed", "strategy", "drop int8 / int16 / found", "ms found / int8 / int16", "int16 operators"]
    columns += ["evaluations", "all else, FFE (by stage)", "evaluations, FFE", "sum, FFE", "float changed by", "FFE"]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return [*head, *lines, "", *_against_peers(found)]


def _against_peers(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    lines = [
        "| tool | FFE, all included | full evaluations of it | int16 operators | source |",
        "|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        sums = [run["overhead"] + run["evaluating"] for run in runs]
        counts = sorted({str(len(run["promoted"])) for run in runs})
        exact = sum(run["exact"] for run in runs)
        lines.append(
            f"| qflow {name} | {statistics.median(run['overhead'] for run in runs):.1f} + "
            f"{statistics.median(run['evaluating'] for run in runs):.1f} = {statistics.median(sums):.1f} "
            f"[{min(sums):.1f}-{max(sums):.1f}] | {statistics.median(run['evaluations'] for run in runs):g} with both "
            f"baselines | {', '.join(counts)}; exactly the planted in {exact} of {len(runs)} | this run |"
        )
    lines += [f"| {tool} | {ffe} | {count} | {promoted} | peers, ran earlier |" for tool, ffe, count, promoted in PEERS]
    return lines
