"""The front that a strategy finds, against the front of all 4096 mixes of a network with 12 operators.

A landscape is one planted network (planted.py) with every mix evaluated once and kept in data/front-*.npz:
samples right, milliseconds at the deployed shape, and for each seed the sensitivities that qflow ranks by.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch

from benchmarks.planted import EVALUATION, NASH_M, TwelveNet, pictures, planted_twelve, task, train
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.settings import QConfigSettings, TrialSettings
from qflow.cost_model.model import CostModel
from qflow.search.assign import Operator, Problem
from qflow.search.cost_terms import CostTerms, cost_terms
from qflow.search.domain import Choice
from qflow.search.objective import CONSTRAINT
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign, raise_until_met
from qflow.search.study import Study, _sampler
from qflow.search.surrogate import hypervolume
from qflow.trial.evaluator import Evaluator

DATA = Path(__file__).parent / "data"
DEPLOYED = (1, 1, 1024, 2048)
GOAL = 0.05
EVALUATIONS, MARKS = 40, (5, 10, 20, 40)
SEEDS = 20  # draws of the 16 samples that the sensitivities are measured on; draw 0 is the bad cases
INT16_STEP = 2.0**-8


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """What every mix comes to; a mix is text as in qconfig.assignment."""

    name: str
    operators: tuple[str, ...]
    drops: Mapping[str, float]
    ms: Mapping[str, float]
    scores: tuple[tuple[float, ...], ...]
    """By seed, then operator."""

    @classmethod
    def read(cls, path: Path) -> Surrogate:
        kept = np.load(path)
        operators = tuple(str(name) for name in kept["operators"])
        mixes = all_mixes(len(operators))
        drops = (float(kept["float_right"]) - kept["right"].astype(float)) / float(kept["samples"])
        return cls(
            path.stem,
            operators,
            dict(zip(mixes, drops.tolist(), strict=True)),
            dict(zip(mixes, kept["ms"].astype(float).tolist(), strict=True)),
            tuple(map(tuple, kept["scores"].astype(float).tolist())),
        )

    def problem(self, seed: int) -> Problem:
        rows = enumerate(zip(self.operators, self.scores[seed % len(self.scores)], strict=True))
        operators = tuple(Operator(name, score, score * INT16_STEP, i) for i, (name, score) in rows)
        return Problem(operators, self.time, len(operators))

    @cached_property
    def time(self) -> CostTerms:
        """The table of times; a residual network's readers share what pairs of operators cost."""
        count = len(self.operators)
        return cost_terms(self.ms.__getitem__, "6" * count, itertools.combinations(range(count), 2))

    def ratio(self, seed: int, count: int) -> str:
        """The `count` most sensitive operators at int16."""
        scores = self.scores[seed % len(self.scores)]
        top = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        return "".join("6" if i in top else "8" for i in range(len(scores)))

    def volume(self, mixes: Iterable[str]) -> float:
        """Hypervolume against the worst drop and the worst time of all mixes."""
        return hypervolume(
            [(self.drops[m], self.ms[m]) for m in mixes], (max(self.drops.values()), max(self.ms.values()))
        )


def all_mixes(count: int) -> list[str]:
    return ["".join(letters) for letters in itertools.product("86", repeat=count)]


def make(number: int, path: Path, *, operators: int | None = None, epochs: int = 16) -> None:
    """Train, plant, evaluate every mix, and keep the table (about 3 minutes)."""
    data = pictures()
    model = planted_twelve(train(TwelveNet, data, epochs=epochs, rate=1e-2, seed=0), number)  # type: ignore[arg-type]
    evaluator = Evaluator(task("front", model, data, DEPLOYED), NASH_M, CostModel(), eval_batch=EVALUATION)
    metric = evaluator.measure_float()
    evaluator.rank()
    names = evaluator.precisions.promotable[:operators]
    rest = "8" * (len(evaluator.precisions.promotable) - len(names))
    right, ms = [], []
    for mix in all_mixes(len(names)):
        result = evaluator.run_trial(TrialSettings(qconfig=QConfigSettings(assignment=mix + rest)))
        right.append(round(result.metric * result.samples))
        ms.append(result.cost.latency_ms)
    np.savez_compressed(
        path,
        operators=np.array(names),
        samples=EVALUATION,
        float_right=round(metric * EVALUATION),
        right=np.array(right, dtype=np.uint16),
        ms=np.array(ms, dtype=np.float32),
        scores=np.array([_scores(evaluator, seed, names) for seed in range(SEEDS)], dtype=np.float32),
    )


def _scores(evaluator: Evaluator, seed: int, names: Sequence[str]) -> list[float]:
    """Sensitivities on the bad cases for seed 0, else on as many calibration samples at random."""
    assert evaluator.sensitivities is not None
    table = evaluator.sensitivities
    if seed:
        evaluator.all(QDtype.qint8)
        count = evaluator.sensitivity_settings.bad_cases
        images = evaluator.task.data.calibration.tensors[0]
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        table = sensitivity(
            evaluator.task.model, evaluator.prepared, [images[chosen]], rows=candidates(evaluator.prepared)
        )
    found = table.activation_scores()
    return [found[name] for name in names]


class Measured:
    """The table as a strategy's `measure`: counts distinct mixes, the two baselines first, and stops at the budget."""

    def __init__(self, land: Surrogate, seed: int) -> None:
        self.land, self.seed = land, seed
        self.mixes: list[str] = []
        for letter in "68":
            self.look(letter * len(land.operators))

    def look(self, mix: str) -> tuple[float, float]:
        if mix not in self.mixes:
            if len(self.mixes) >= EVALUATIONS:
                raise BudgetSpent("search.n_trials")
            self.mixes.append(mix)
        return self.land.drops[mix], self.land.ms[mix]

    def __call__(self, point: Mapping[str, Any], label: str = "") -> FinishedTrial:
        if ASSIGNMENT in point:
            mix = point[ASSIGNMENT]
        else:
            mix = self.land.ratio(self.seed, round(point["qconfig.int16_ratio"] * len(self.land.operators)))
        drop, ms = self.look(mix)
        metrics = {"accuracy/drop": drop, "cost/latency_ms": ms}
        outcome = Outcome((-drop, ms), {CONSTRAINT: drop - GOAL}, {}, metrics)
        return FinishedTrial(len(self.mixes), "", point, label, outcome, 0.0)

    def curve(self) -> list[float]:
        """Share of the exhaustive hypervolume after each of MARKS evaluations."""
        whole = self.land.volume(self.land.drops)
        return [self.land.volume(self.mixes[:mark]) / whole for mark in MARKS]


def by_assign(measure: Measured) -> None:
    land = measure.land
    count = len(land.operators)
    assign(
        measure,
        {},
        land.problem(measure.seed),
        max_drop=GOAL,
        int8_drop=land.drops["8" * count],
        int16_drop=land.drops["6" * count],
    )


def by_ratio(measure: Measured) -> None:
    """The ladder to the goal, then every rung that is left: all that a ratio can give."""
    count = len(measure.land.operators)
    rungs = [k / count for k in range(count + 1)]
    raise_until_met(measure, {}, "qconfig.int16_ratio", rungs)
    for rung in rungs:
        measure({"qconfig.int16_ratio": rung})


def by_optuna(kind: str) -> Callable[[Measured], None]:
    """A sampler over a switch for each operator, asked and told as the loop does (twins are asked again)."""

    def run(measure: Measured) -> None:
        names = [f"op{i:02d}" for i in range(len(measure.land.operators))]
        directions = ("maximize", "minimize")
        inner = optuna.create_study(directions=list(directions), sampler=_sampler(kind, measure.seed, EVALUATIONS))
        study = Study(inner, dict.fromkeys(names, Choice(("qint8", "qint16"))), directions, Path())
        for dtype in ("qint16", "qint8"):
            study.enqueue(dict.fromkeys(names, dtype))
        told: set[str] = set()
        spare, twins = random.Random(measure.seed), 0
        unseen = set(all_mixes(len(names)))
        while unseen - told:
            proposal = study.ask()
            mix = "".join("6" if proposal.params[name] == "qint16" else "8" for name in names)
            if mix in told:
                study.fail(proposal.number, "twin", "known")
                twins += 1
                if twins > 3:  # as loop.Driver.sample
                    point = spare.choice(sorted(unseen - told))
                    study.enqueue({n: "qint16" if x == "6" else "qint8" for n, x in zip(names, point, strict=True)})
                continue
            twins = 0
            told.add(mix)
            drop, ms = measure.look(mix)
            study.complete(proposal.number, (-drop, ms))

    return run


STRATEGIES: dict[str, Callable[[Measured], None]] = {
    "assign": by_assign,
    "ratio": by_ratio,
    "optuna TPE": by_optuna("tpe"),
    "optuna NSGA-II": by_optuna("nsga2"),
    "optuna GP": by_optuna("gp"),
    "random": by_optuna("random"),
}


def front(files: Sequence[Path], seeds: int, only: Sequence[str]) -> list[list[str]]:
    """Rows: landscape, strategy, median (worst) share of the hypervolume at each mark, evaluations, CPU s a search."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for path in files:
        land = Surrogate.read(path)
        for name in only:
            runs, spent = [], []
            for seed in range(seeds):
                measure, start = Measured(land, seed), time.process_time()
                with suppress(BudgetSpent):
                    STRATEGIES[name](measure)
                spent.append(time.process_time() - start)
                runs.append((measure.curve(), len(measure.mixes)))
            curves = [[curve[i] for curve, _ in runs] for i in range(len(MARKS))]
            rows.append(
                [
                    land.name,
                    name,
                    *(f"{statistics.median(c):.3f} ({min(c):.3f})" for c in curves),
                    f"{max(count for _, count in runs)}",
                    f"{statistics.median(spent):.2f}",
                ]
            )
    return rows


def describe(path: Path) -> str:
    """One line on a landscape."""
    land = Surrogate.read(path)
    drops = sorted(land.drops.values())
    int8, int16 = ("8" * len(land.operators), "6" * len(land.operators))
    shares = [sum(d <= limit for d in drops) / len(drops) for limit in (0.01, 0.05, 0.2)]
    return (
        f"{land.name}: {len(drops)} mixes, drop all-int8 {land.drops[int8]:.3f}, all-int16 {land.drops[int16]:.3f}, "
        f"median {drops[len(drops) // 2]:.3f}, worst {drops[-1]:.3f}; "
        f"at most 0.01 / 0.05 / 0.2: {' / '.join(f'{s:.1%}' for s in shares)}; "
        f"{min(land.ms.values()):.2f} to {max(land.ms.values()):.2f} ms, all-int16 {land.ms[int16]:.2f} ms; "
        f"{len(exhaustive_front(land))} mixes on the front"
    )


def exhaustive_front(land: Surrogate) -> list[str]:
    found, best = [], float("inf")
    for mix in sorted(land.drops, key=lambda m: (land.ms[m], land.drops[m])):
        if land.drops[mix] < best:
            best = land.drops[mix]
            found.append(mix)
    return found
