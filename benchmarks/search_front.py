"""Compares the front that a strategy finds with the front of all 4096 mixes of a network with 12 operators."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from benchmarks.front_problem import EnumeratedProblem, all_mixes, exhaustive_front
from qflow.search.domain import Choice
from qflow.search.next_mix import Front
from qflow.search.objective import CONSTRAINT
from qflow.search.outcome import FinishedTrial, Outcome
from qflow.search.sampler import make_sampler
from qflow.search.strategies import ASSIGNMENT, BudgetSpent, assign, raise_until_met
from qflow.search.study import Study
from qflow.search.terms import Terms

DATA = Path(__file__).parent / "data"
GOAL = 0.05
EVALUATIONS, MARKS = 40, (5, 10, 20, 40)


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
        """Share of the hypervolume of all mixes after each of MARKS evaluations, up to the budget."""
        whole = self.problem.volume(self.problem.drops)
        return [self.problem.volume(self.mixes[:mark]) / whole for mark in MARKS if mark <= self.most]


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


def by_known_pairs(measure: Measured) -> None:
    """What the effects of all operators and pairs would find if they were known: the least-squares fit of all drops.

    Each mix is the one of most expected hypervolume, with the fit's residuals as the deviation.
    """
    problem, mixes = measure.problem, all_mixes(len(measure.problem.operators))
    int8 = np.array([[letter == "8" for letter in mix] for mix in mixes], dtype=float)
    first, second = np.triu_indices(int8.shape[1])  # with each operator itself, whose square is the operator
    effects = np.hstack([np.ones((len(mixes), 1)), int8[:, first] * int8[:, second]])
    drops, times = (np.array([of[mix] for mix in mixes]) for of in (problem.drops, problem.ms))
    fitted = effects @ np.linalg.lstsq(effects, drops, rcond=None)[0]
    deviations = np.full(len(mixes), np.std(drops - fitted))
    while len(measure.mixes) < len(mixes):
        known = Front([(problem.drops[mix], problem.ms[mix]) for mix in measure.mixes], (drops.max(), times.max()))
        gains = np.where(np.isin(mixes, measure.mixes), -1.0, known.gains(fitted, deviations, times))
        measure.look(mixes[int(gains.argmax())])


def by_optuna(kind: str) -> Callable[[Measured], None]:
    """An Optuna sampler with one categorical parameter per operator. As in a study, a proposal that repeats a measured
    mix is refused and the sampler asked again, and after a few of them a random mix is taken.
    """

    def run(measure: Measured) -> None:
        names = [f"op{i:02d}" for i in range(len(measure.problem.operators))]
        directions = ("maximize", "minimize")
        sampler = make_sampler(kind, measure.seed, EVALUATIONS)
        inner = optuna.create_study(directions=list(directions), sampler=sampler)
        terms = Terms(inner, dict.fromkeys(names, Choice(("qint8", "qint16"))), directions)
        study = Study(inner, terms, Path(), lambda _: sampler, shared=False)
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
    "pairs known": by_known_pairs,
    "ratio": by_ratio,
    "optuna TPE": by_optuna("tpe"),
    "optuna NSGA-II": by_optuna("nsga2"),
    "optuna GP": by_optuna("gp"),
    "random": by_optuna("random"),
}


def front(files: Sequence[Path], seeds: int, only: Sequence[str], most: int = EVALUATIONS) -> list[list[str]]:
    """Rows of the table: test problem, strategy, median (worst) share of the hypervolume at each of MARKS up to `most`,
    largest number of evaluations, CPU seconds per search.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = []
    for path in files:
        problem = EnumeratedProblem.read(path)
        for name in only:
            runs, spent = [], []
            for seed in range(seeds):
                measure, start = Measured(problem, seed, most), time.process_time()
                with suppress(BudgetSpent):
                    STRATEGIES[name](measure)
                spent.append(time.process_time() - start)
                runs.append((measure.curve(), len(measure.mixes)))
            curves = list(zip(*(curve for curve, _ in runs), strict=True))
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
