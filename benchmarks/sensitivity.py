"""Cost of a sensitivity table: `python -m benchmarks.sensitivity [--rounds 3] [--only resnet20:64 mobilenetv2:1]`.

Each method ranks every quantizer of the same calibrated network on the same samples: a naive loop of full forward
passes, exact by replay, screened, and estimate. They take turns, in process CPU time on one thread. The unit is one
float forward pass over the same samples (FFE), per quantizer; `of naive` is the ratio to the naive loop of the same
round. The ranks of the estimates over five seeds are compared with the naive scores: Spearman correlation (median,
worst), and the share of the exact top 20 % that lies in the estimated top 40 % (worst). If ModelOpt is installed
(peers.py), it ranks the same network on the same samples in the same round, in FFE per layer.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.engine import calibrated
from benchmarks.networks import NETWORKS, build, images
from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.measures.distances import Distances
from qflow.analysis.measures.tables import SensitivityTable
from qflow.analysis.sensitivity.candidates import Candidate, candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.settings import SensitivitySettings
from qflow.process.allocator import keep_freed_memory
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.replay import full_forward

CASES = ("resnet20:64", "resnet20:4", "resnet56:64", "mobilenetv2:64", "mobilenetv2:1", "unet:64", "unet:2")
METHODS = ("exact", "screened", "estimate")
SEEDS = range(5)

Scores = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Subject:
    """A calibrated network and its samples."""

    model: nn.Module
    prepared: QuantizedModel
    samples: Tensor
    rows: list[Candidate]

    def naive(self) -> Scores:
        """Scores by definition: one full forward pass per quantizer."""
        distances = Distances("L1", len(self.rows))
        with torch.no_grad():
            distances.reference({"0": self.model(self.samples)}, len(self.samples))
            for i, row in enumerate(self.rows):
                distances.add(i, full_forward(self.prepared, self.samples, row.variant))
        return {(r.node.name, r.sensitive_type): distances.result(i)[0] for i, r in enumerate(self.rows)}

    def ranked(self, method: str, seed: int = 0) -> SensitivityTable:
        """qflow's table."""
        settings = SensitivitySettings(method=method, seed=seed)
        return sensitivity(self.model, self.prepared, [self.samples], settings=settings, rows=self.rows)


def subject(name: str, batch: int) -> Subject:
    """Build a network, draw samples, and calibrate."""
    model = build(name)
    samples = images(batch, NETWORKS[name][1], seed=5)
    prepared = calibrated(model, samples[: min(batch, 16)])
    return Subject(model, prepared, samples, candidates(prepared))


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of a call, and its result."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def spearman(a: Scores, b: Scores) -> float:
    """Rank correlation."""
    keys = sorted(a)
    ranks = [{k: i for i, k in enumerate(sorted(keys, key=lambda k: s[k]))} for s in (a, b)]
    x, y = ([float(r[k]) for k in keys] for r in ranks)
    return statistics.correlation(x, y)


def scores(found: SensitivityTable) -> Scores:
    return {(r.op_name, r.sensitive_type): r.score for r in found.rows}


def row(name: str, batch: int, rounds: int) -> list[str]:
    """Cells of one network and batch size."""
    subject_ = subject(name, batch)
    count = len(subject_.rows)
    taken: dict[str, list[float]] = {}
    with torch.no_grad():
        subject_.model(subject_.samples)
    for _ in range(rounds):
        with torch.no_grad():
            float_s = statistics.median(seconds(lambda: subject_.model(subject_.samples))[0] for _ in range(3))
        naive_s, exact = seconds(subject_.naive)
        taken.setdefault("float", []).append(float_s)
        taken.setdefault("naive", []).append(naive_s / float_s / count)
        for method in METHODS:
            spent, _ = seconds(lambda m=method: subject_.ranked(m))  # type: ignore[misc]
            taken.setdefault(method, []).append(spent / float_s / count)
            taken.setdefault(f"{method} of naive", []).append(spent / naive_s)
        spent, _ = seconds(lambda: compare_layers(subject_.model, subject_.prepared, subject_.samples))
        taken.setdefault("layers", []).append(spent / float_s)
        if peers.installed():
            spent, layers = peers.modelopt_ranking(subject_.model, subject_.samples)
            taken.setdefault("peer", []).append(spent / float_s / layers)
    cells = [f"{name} b{batch}", str(count), f"{statistics.median(taken['float']) * 1e3:.0f} ms"]
    cells.append(f"{statistics.median(taken['naive']):.2f}")
    for method in METHODS:
        own, ratio = (statistics.median(taken[k]) for k in (method, f"{method} of naive"))
        cells.append(f"{own:.2f} ({ratio:.2f} of naive)")
    peer = f"{statistics.median(taken['peer']):.2f}" if "peer" in taken else "-"
    return [*cells, f"{statistics.median(taken['layers']):.1f}", peer, quality(subject_, exact)]


def quality(subject_: Subject, exact: Scores) -> str:
    """How well estimates rank over the seeds; "all exact" if every row was measured instead."""
    tables = [subject_.ranked("estimate", seed) for seed in SEEDS]
    if any(t.exact for t in tables):
        return "all exact"
    found = sorted(spearman(exact, scores(t)) for t in tables)
    top = set(sorted(exact, key=lambda k: -exact[k])[: len(exact) // 5])
    shares = []
    for t in tables:
        kept = scores(t)
        half = set(sorted(kept, key=lambda k: -kept[k])[: -(-2 * len(kept) // 5)])
        shares.append(len(top & half) / len(top))
    return f"{found[len(found) // 2]:.3f} ({found[0]:.3f}), {min(shares):.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=CASES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # as qflow's commands do; without it the unit, a float forward, takes up to 1.7 times as long
    header = [
        "network",
        "quantizers",
        "FFE",
        "naive",
        *METHODS,
        "layers",
        "ModelOpt",
        "Spearman (worst), top 20 % in top 40 %",
    ]
    lines = [header, ["---"] * len(header)]
    for case in options.only:
        name, _, batch = case.partition(":")
        lines.append(row(name, int(batch), options.rounds))
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds; FFE a quantizer, a layer with ModelOpt.\n")
    print("\n".join(f"| {' | '.join(cells)} |" for cells in lines))


if __name__ == "__main__":
    main()
