"""Compares the front that a strategy finds with the front of all 4096 mixes of a network with 12 operators.

A test problem is one network with planted damage (planted.py), every mix of which was evaluated once. Its file
data/front-*.npz holds for every mix the number of correct samples and the milliseconds at the deployed shape, and for
each seed the sensitivities that qflow ranks by.
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
SEEDS = 20  # draws of the 16 samples on which the sensitivities are measured; draw 0 takes the bad cases
INT16_STEP = 2.0**-8


@dataclasses.dataclass(frozen=True)
class EnumeratedProblem:
    """A test problem with the drop and the time of every mix; a mix is text as in qconfig.assignment."""

    name: str
    operators: tuple[str, ...]
    drops: Mapping[str, float]
    ms: Mapping[str, float]
    scores: tuple[tuple[float, ...], ...]
    """Sensitivities by seed, then operator."""

    @classmethod
    def read(cls, path: Path) -> EnumeratedProblem:
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

    def assignment_problem(self, seed: int) -> Problem:
        rows = enumerate(zip(self.operators, self.scores[seed % len(self.scores)], strict=True))
        operators = tuple(Operator(name, score, score * INT16_STEP, i) for i, (name, score) in rows)
        return Problem(operators, self.time, len(operators))

    @cached_property
    def time(self) -> CostTerms:
        """The times as cost terms with pairs of operators, because an add of a residual network reads two of them."""
        count = len(self.operators)
        return cost_terms(self.ms.__getitem__, "6" * count, itertools.combinations(range(count), 2))

    def ratio(self, seed: int, count: int) -> str:
        """The mix with the `count` most sensitive operators at int16."""
        scores = self.scores[seed % len(self.scores)]
        top = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
        return "".join("6" if i in top else "8" for i in range(len(scores)))

    def volume(self, mixes: Iterable[str]) -> float:
        """Hypervolume of `mixes` up to the worst drop and the worst time of all mixes."""
        return hypervolume(
            [(self.drops[m], self.ms[m]) for m in mixes], (max(self.drops.values()), max(self.ms.values()))
        )


def all_mixes(count: int) -> list[str]:
    return ["".join(letters) for letters in itertools.product("86", repeat=count)]


def make(number: int, path: Path, *, operators: int | None = None, epochs: int = 16) -> None:
    """Train a network, plant the damage, evaluate every mix, and write the results to `path` (about 3 minutes)."""
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
    """Sensitivities on the bad cases for seed 0, otherwise on as many random calibration samples."""
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
    """A strategy's `measure` that looks mixes up: it counts distinct ones, baselines first, and stops at the budget."""

    def __init__(self, problem: EnumeratedProblem, seed: int, most: int = EVALUATIONS) -> None:
        self.problem, self.seed, self.most = problem, seed, most
        self.mixes: list[str] = []
        for letter in "68":
            self.look(letter * len(problem.operators))

    def look(self, mix: str) -> tuple[float, float]:
        if mix not in self.mixes:
            if len(self.mixes) >= self.most:
                raise BudgetSpent("search.n_trials")
            self.mixes.append(mix)
        return self.problem.drops[mix], self.problem.ms[mix]

    def __call__(self, point: Mapping[str, Any], label: str = "") -> FinishedTrial:
        if ASSIGNMENT in point:
            mix = point[ASSIGNMENT]
        else:
            mix = self.problem.ratio(self.seed, round(point["qconfig.int16_ratio"] * len(self.problem.operators)))
        drop, ms = self.look(mix)
        metrics = {"accuracy/drop": drop, "cost/latency_ms": ms}
        outcome = Outcome((-drop, ms), {CONSTRAINT: drop - GOAL}, {}, metrics)
        return FinishedTrial(len(self.mixes), "", point, label, outcome, 0.0)

    def curve(self) -> list[float]:
        """Share of the hypervolume of all mixes after each of MARKS evaluations."""
        whole = self.problem.volume(self.problem.drops)
        return [self.problem.volume(self.mixes[:mark]) / whole for mark in MARKS]


def by_assign(measure: Measured) -> None:
    problem = measure.problem
    count = len(problem.operators)
    assign(
        measure,
        {},
        problem.assignment_problem(measure.seed),
        max_drop=GOAL,
        int8_drop=problem.drops["8" * count],
        int16_drop=problem.drops["6" * count],
    )


def by_ratio(measure: Measured) -> None:
    """Raise the int16 ratio until the goal is met, then measure every other ratio."""
    count = len(measure.problem.operators)
    ratios = [k / count for k in range(count + 1)]
    raise_until_met(measure, {}, "qconfig.int16_ratio", ratios)
    for ratio in ratios:
        measure({"qconfig.int16_ratio": ratio})


def by_optuna(kind: str) -> Callable[[Measured], None]:
    """An Optuna sampler with one categorical parameter per operator. As in a study, a proposal that repeats a measured
    mix is refused and the sampler asked again, and after a few of them a random mix is taken.
    """

    def run(measure: Measured) -> None:
        names = [f"op{i:02d}" for i in range(len(measure.problem.operators))]
        directions = ("maximize", "minimize")
        inner = optuna.create_study(directions=list(directions), sampler=_sampler(kind, measure.seed, EVALUATIONS))
        study = Study(inner, dict.fromkeys(names, Choice(("qint8", "qint16"))), directions, Path())
        for dtype in ("qint16", "qint8"):
            study.enqueue(dict.fromkeys(names, dtype))
        measured: set[str] = set()
        spare, repeats = random.Random(measure.seed), 0
        mixes = set(all_mixes(len(names)))
        while mixes - measured:
            proposal = study.ask()
            mix = "".join("6" if proposal.params[name] == "qint16" else "8" for name in names)
            if mix in measured:
                study.fail(proposal.number, "twin", "known")
                repeats += 1
                if repeats > 3:  # as in loop.Driver.sample
                    point = spare.choice(sorted(mixes - measured))
                    study.enqueue({n: "qint16" if x == "6" else "qint8" for n, x in zip(names, point, strict=True)})
                continue
            repeats = 0
            measured.add(mix)
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
    """Rows of the table: test problem, strategy, median (worst) share of the hypervolume at each of MARKS, largest
    number of evaluations, CPU seconds per search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for path in files:
        problem = EnumeratedProblem.read(path)
        for name in only:
            runs, spent = [], []
            for seed in range(seeds):
                measure, start = Measured(problem, seed), time.process_time()
                with suppress(BudgetSpent):
                    STRATEGIES[name](measure)
                spent.append(time.process_time() - start)
                runs.append((measure.curve(), len(measure.mixes)))
            curves = [[curve[i] for curve, _ in runs] for i in range(len(MARKS))]
            rows.append(
                [
                    problem.name,
                    name,
                    *(f"{statistics.median(c):.3f} ({min(c):.3f})" for c in curves),
                    f"{max(count for _, count in runs)}",
                    f"{statistics.median(spent):.2f}",
                ]
            )
    return rows


def describe(path: Path) -> str:
    """One line on a test problem."""
    problem = EnumeratedProblem.read(path)
    drops = sorted(problem.drops.values())
    int8, int16 = ("8" * len(problem.operators), "6" * len(problem.operators))
    shares = [sum(d <= limit for d in drops) / len(drops) for limit in (0.01, 0.05, 0.2)]
    return (
        f"{problem.name}: {len(drops)} mixes, drop all-int8 {problem.drops[int8]:.3f}, "
        f"all-int16 {problem.drops[int16]:.3f}, median {drops[len(drops) // 2]:.3f}, worst {drops[-1]:.3f}; "
        f"at most 0.01 / 0.05 / 0.2: {' / '.join(f'{s:.1%}' for s in shares)}; "
        f"{min(problem.ms.values()):.2f} to {max(problem.ms.values()):.2f} ms, all-int16 {problem.ms[int16]:.2f} ms; "
        f"{len(exhaustive_front(problem))} mixes on the front"
    )


def exhaustive_front(problem: EnumeratedProblem) -> list[str]:
    found, best = [], float("inf")
    for mix in sorted(problem.drops, key=lambda m: (problem.ms[m], problem.drops[m])):
        if problem.drops[mix] < best:
            best = problem.drops[mix]
            found.append(mix)
    return found
