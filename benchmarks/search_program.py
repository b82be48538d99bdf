"""Times the 0/1 program on deep networks, with int16 weights in the choice, and prints the gap that it proves."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.data import TensorDataset

from benchmarks.networks import ResNet
from benchmarks.planted import task
from benchmarks.search_minimal import FREE_ADDS
from qflow.analysis.measures.tables import SensitivityTable
from qflow.analysis.sensitivity.candidates import candidates
from qflow.core.settings import QConfigSettings
from qflow.cost_model.model import CostModel
from qflow.search.integer_program import GAP, Solution, solve
from qflow.trial.evaluator import Evaluator

BUDGETS = 19
CASES = ((50, "activation"), (25, "both"), (50, "both"))
"""Blocks of a stage, and what may be int16: outputs alone, or outputs and weights."""
SPREAD = 2.0  # of the logarithm of the errors: the largest is hundreds of times the median


def ranked(blocks: int, seed: int, side: int) -> Evaluator:
    """ResNet of 6 `blocks` + 2 layers, with random sensitivities, where the device lets every output be int16."""
    model = ResNet(blocks)
    data = TensorDataset(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.long))
    evaluator = Evaluator(task("deep", model, data, (1, 3, 224, 224), 1), FREE_ADDS, CostModel())
    rng = random.Random(seed)
    prepared = evaluator.prepare()
    rows = [row.row(rng.lognormvariate(0.0, SPREAD), 0.0, {}, exact=True) for row in candidates(prepared)]
    evaluator.sensitivities = SensitivityTable(
        metric="L1", merge="", samples=1, flops=0, exact=True, rows=tuple(rows), method="random"
    )
    return evaluator


def program(cases: Sequence[tuple[int, str]] = CASES, seeds: int = 3, side: int = 32) -> list[list[str]]:
    """Rows of the table: network, what is free, its number, CPU time of the terms and of a solution, proved gap."""
    rows = []
    for blocks, kind in cases:
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
                f"ResNet-{6 * blocks + 2}",
                "outputs" if kind == "activation" else "outputs and weights",
                f"{count}",
                f"{statistics.median(built):.1f} s",
                f"{statistics.median(seconds):.2f} s ({max(seconds):.2f} s)",
                f"{statistics.median(gaps):.4%} ({max(gaps):.4%})",
                f"{sum(gap > GAP for gap in gaps)} of {len(gaps)}",
            ]
        )
    return rows
