"""Times the 0/1 program on ResNet-302 and prints the gap that it proves, with int16 weights in the choice."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.data import TensorDataset

from benchmarks.networks import ResNet
from benchmarks.planted import NASH_M, task
from qflow.analysis.measures.tables import SensitivityTable
from qflow.analysis.sensitivity.candidates import candidates
from qflow.core.settings import QConfigSettings
from qflow.cost_model.model import CostModel
from qflow.search.integer_program import GAP, Solution, solve
from qflow.trial.evaluator import Evaluator

BUDGETS = 19
SPREAD = 2.0  # of the logarithm of the errors: the largest is hundreds of times the median


def ranked(blocks: int, seed: int, side: int) -> Evaluator:
    """ResNet of 6 `blocks` + 2 layers on nash-m, with random sensitivities."""
    model = ResNet(blocks)
    data = TensorDataset(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.long))
    evaluator = Evaluator(task("deep", model, data, (1, 3, 224, 224), 1), NASH_M, CostModel())
    rng = random.Random(seed)
    prepared = evaluator.prepare()
    rows = [row.row(rng.lognormvariate(0.0, SPREAD), 0.0, {}, exact=True) for row in candidates(prepared)]
    evaluator.sensitivities = SensitivityTable(
        metric="L1", merge="", samples=1, flops=0, exact=True, rows=tuple(rows), method="random"
    )
    return evaluator


def program(blocks: int = 50, seeds: int = 3, side: int = 32) -> list[list[str]]:
    """Rows of the table: what is free, operators and weights, CPU time of the terms, time and proved gap by budget."""
    rows = []
    for kind in ("activation", "both"):
        built, seconds, gaps, count = [], [], list[float](), 0

        def recorded(*arguments: Any, gaps: list[float] = gaps) -> Solution | None:
            found = solve(*arguments)
            gaps += [found.gap] if found else []
            return found

        for seed in range(seeds):
            precisions = ranked(blocks, seed, side).precisions
            start = time.process_time()
            problem = precisions.problem(QConfigSettings(sensitive_type=kind))
            built.append(time.process_time() - start)
            count = len(problem.operators)
            for k in range(1, BUDGETS + 1):
                budget, start = problem.budget((k / (BUDGETS + 1)) ** 2), time.process_time()
                with patch("qflow.search.assign.solve", recorded):
                    problem.cheapest(budget)
                seconds.append(time.process_time() - start)
        rows.append(
            [
                "outputs" if kind == "activation" else "outputs and weights",
                f"{count}",
                f"{statistics.median(built):.1f} s",
                f"{statistics.median(seconds):.2f} s ({max(seconds):.2f} s)",
                f"{statistics.median(gaps):.4%} ({max(gaps):.4%})",
                f"{sum(gap > GAP for gap in gaps)} of {len(gaps)}",
            ]
        )
    return rows
