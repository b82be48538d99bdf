"""Measures what keeping freed memory saves: `python -m benchmarks.allocator [--rounds 3]`.

Two fresh processes in turn run float forward passes of large batches: one with the default of the C library, one with
`qflow.process.allocator.keep_freed_memory`. The table shows the median process CPU time of a pass and the process's
peak memory. One thread.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.networks import build
from qflow.process.allocator import keep_freed_memory

CASES = ("mobilenetv2:16:224", "mobilenetv2:4:224", "unet:8:256", "unet:2:256", "resnet56:64:32")
PASSES = 5


def one(case: str) -> tuple[float, int]:
    """Seconds of a forward pass, and the process's peak memory in MB."""
    torch.set_num_threads(1)
    name, batch, side = case.split(":")
    model, images = build(name), torch.randn(int(batch), 3, int(side), int(side))
    taken = []
    with torch.no_grad():
        model(images)
        for _ in range(PASSES):
            start = time.process_time()
            model(images)
            taken.append(time.process_time() - start)
    return statistics.median(taken), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=CASES)
    parser.add_argument("--process", choices=("left", "kept"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.process:
        if options.process == "kept":
            keep_freed_memory()
        print(*one(options.only[0]))
        return
    print("| network, batch, side | left to the C library | kept | time | peak memory |")
    print("| --- | --- | --- | --- | --- |")
    for case in options.only:
        found: dict[str, list[tuple[float, int]]] = {"left": [], "kept": []}
        for _ in range(options.rounds):
            for how, values in found.items():
                command = [sys.executable, "-m", "benchmarks.allocator", "--process", how, "--only", case]
                seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
                values.append((float(seconds), int(peak)))
        (left, left_mb), (kept, kept_mb) = (
            [statistics.median(column) for column in zip(*values, strict=True)] for values in found.values()
        )
        cells = [case, f"{left * 1e3:.0f} ms, {left_mb:.0f} MB", f"{kept * 1e3:.0f} ms, {kept_mb:.0f} MB"]
        print(f"| {' | '.join([*cells, f'{kept / left:.2f}', f'{kept_mb / left_mb:.2f}'])} |")


if __name__ == "__main__":
    main()
