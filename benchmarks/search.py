"""Measures what a search finds and costs: `python -m benchmarks.search [section ...] [--small]`.

minimal    ResNet-20 with damage planted in three blocks: which operators are promoted, and the cost in FFE (time over
           that of one float forward pass over the calibration set)
front      40 evaluations of each strategy against the front of all 4096 mixes; `--make 1` makes data/front-1.npz anew
program    the 0/1 program of deep networks: CPU time of a solution, median (worst) of budgets, and the proved gap
overhead   the time of a trial beyond its calibration and evaluation, in a study as the command `qflow.tune` runs it

One thread. `--small` runs everything in miniature to test the benchmark; its numbers are meaningless.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import front_problem, search_front, search_minimal, search_overhead, search_program

SECTIONS = ("minimal", "front", "program", "overhead")
WEIGHTS = Path("qflow_out/benchmarks")  # trained networks; ignored by git


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def minimal(seeds: Sequence[int], small: bool) -> str:
    if not small:
        return "\n".join(search_minimal.minimal(WEIGHTS, list(seeds)))
    with tempfile.TemporaryDirectory() as folder:
        return "\n".join(search_minimal.minimal(Path(folder), [0], epochs=0, evaluation=64, side=8))


def front(problems: Sequence[int], only: Sequence[str], seeds: int, most: int, small: bool) -> str:
    marks = [f"{mark} evaluations" for mark in search_front.MARKS if mark <= most]
    header = ["test problem", "strategy", *marks, "most", "CPU s a search"]
    if not small:
        files = [search_front.DATA / f"front-{number}.npz" for number in problems]
        rows = search_front.front(files, seeds, only, most)
        return "\n".join([*map(search_front.describe, files), "", table(header, rows)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "front-0.npz"
        front_problem.make(1, path, operators=5, epochs=1)
        return "\n".join([search_front.describe(path), "", table(header, search_front.front([path], 1, only, most))])


def program(small: bool) -> str:
    header = ["network", "free", "operators", "terms", "a solution", "proved gap", "gaps above 0.01 %"]
    return table(header, search_program.program([(1, "both")], 1) if small else search_program.program())


def overhead(small: bool) -> str:
    header = ["task", "trials", "a trial", "calibrate, evaluate", "rest of the evaluator", "loop, study, store", "both"]
    cases = [("digits", 2)] if small else [("perception", 12), ("digits", 12)]
    return table(
        [*header, "share (range)", "both, processor time"], [search_overhead.overhead(*case) for case in cases]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), help="minimal: one training per seed")
    parser.add_argument("--landscapes", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="front: the test problems")
    parser.add_argument("--draws", type=int, default=10, help="front: number of seeds")
    parser.add_argument("--evaluations", type=int, default=search_front.EVALUATIONS, help="front: of each search")
    parser.add_argument("--only", nargs="+", default=list(search_front.STRATEGIES), help="front: the strategies")
    parser.add_argument("--make", type=int, help="front: make the file of this test problem and end")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.make is not None:
        front_problem.make(options.make, search_front.DATA / f"front-{options.make}.npz")
        return
    print(f"torch {torch.__version__}, one thread\n")
    for section in options.sections or SECTIONS:
        if section == "minimal":
            print(minimal(options.seeds, options.small), flush=True)
        elif section == "front":
            print(
                front(options.landscapes, options.only, options.draws, options.evaluations, options.small), flush=True
            )
        elif section == "program":
            print(program(options.small), flush=True)
        else:
            print(overhead(options.small), flush=True)
        print()


if __name__ == "__main__":
    main()
