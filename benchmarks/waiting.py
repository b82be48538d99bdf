"""Measures what short spinning of threads saves if processes share cores: `python -m benchmarks.waiting [--rounds 3]`.

Fresh processes with as many threads as cores run float forward passes, one process alone and two at once. Threads wait
as libgomp does by default, or as after `qflow.process.waiting.wait_briefly`. The table shows the median wall time of a
pass in the slower process: its median and, in brackets, its largest value over the rounds, because two processes that
spin hinder each other in some rounds and not in others. No other program may run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from qflow.process.waiting import SPINS

CASES = ("resnet20:64:32", "resnet20:4:32", "mobilenetv2:4:32", "unet:4:64")
SECONDS = 3.0  # each process runs for so long, so that two of them overlap


def one(case: str) -> float:
    """Seconds of a forward pass."""
    import torch  # not at the top: libgomp reads the environment when it is loaded

    from benchmarks.networks import build

    name, batch, side = case.split(":")
    model, images = build(name), torch.randn(int(batch), 3, int(side), int(side))
    taken: list[float] = []
    with torch.no_grad():
        model(images)
        end = time.perf_counter() + SECONDS
        while time.perf_counter() < end or len(taken) < 3:
            start = time.perf_counter()
            model(images)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def at_once(case: str, processes: int, environment: dict[str, str]) -> float:
    """Seconds of a pass in the slowest of `processes` processes."""
    command = [sys.executable, "-m", "benchmarks.waiting", "--process", "--only", case]
    started = [
        subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    return max(float(process.communicate()[0]) for process in started)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=CASES)
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.process:
        print(one(options.only[0]))
        return
    ways = {"libgomp": {}, "briefly": {"GOMP_SPINCOUNT": SPINS}}
    print("| network, batch, side | alone: libgomp | briefly | ratio | two at once: libgomp | briefly | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for case in options.only:
        found: dict[tuple[int, str], list[float]] = {(count, way): [] for count in (1, 2) for way in ways}
        for _ in range(options.rounds):
            for (count, way), values in found.items():
                values.append(at_once(case, count, ways[way]))
        cells = [case]
        for count in (1, 2):
            left, brief = (found[count, way] for way in ways)
            cells += [f"{statistics.median(v) * 1e3:.1f} ({max(v) * 1e3:.1f}) ms" for v in (left, brief)]
            cells.append(f"{statistics.median(brief) / statistics.median(left):.2f}")
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
