"""A test problem of the search: a network with planted damage (planted.py), every mix of which was evaluated once.

Its file data/front-*.npz holds for every mix the number of correct samples and the milliseconds at the deployed shape,
and for each seed the sensitivities that qflow ranks by.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from benchmarks.planted import EVALUATION, NASH_M, TwelveNet, pictures, planted_twelve, task, train
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.settings import QConfigSettings, TrialSettings
from qflow.cost_model.model import CostModel
from qflow.search.assign import Operator, Problem
from qflow.search.cost_terms import CostTerms, cost_terms
from qflow.search.surrogate import hypervolume
from qflow.trial.evaluator import Evaluator

DEPLOYED = (1, 1, 1024, 2048)
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


def exhaustive_front(problem: EnumeratedProblem) -> list[str]:
    found, best = [], float("inf")
    for mix in sorted(problem.drops, key=lambda m: (problem.ms[m], problem.drops[m])):
        if problem.drops[mix] < best:
            best = problem.drops[mix]
            found.append(mix)
    return found
