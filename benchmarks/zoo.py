"""Takes all real models through the whole library: `python -m benchmarks.zoo [--only swin detr] [--trace]`.

The models are those of tests/zoo_real (timm, torchvision, transformers, networks of our own, an ONNX file), in small
sizes. Prints one row for each: operators, steps passed, seconds, and what failed. Exits with 1 if a step fails. A model
whose package is not installed is named and left out; `make zoo` installs them.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

HEAD = ("model", "operators", "steps passed", "seconds", "failed")


def passed(entry: Any, trace: bool) -> tuple[tuple[str, ...], bool]:
    """(the row of a model, whether it passed all steps)."""
    from zoo_real.through import STEPS, Passage

    begun, failed = time.perf_counter(), []
    way = Passage(entry)
    for step in STEPS:
        try:
            way.run(step)
        except Exception as error:  # a step may fail in any way; the table shows it
            failed.append(" ".join(f"{step}: {type(error).__name__}: {error}".split())[:160])
            if trace:
                traceback.print_exc()
    operators = len(way.prepared.graph.quantized) if way.prepared is not None else 0
    row = (
        entry.name, str(operators), f"{len(STEPS) - len(failed)} of {len(STEPS)}",
        f"{time.perf_counter() - begun:.1f}", "; ".join(failed),
    )  # fmt: skip
    return row, not failed


def main(argv: Sequence[str] | None = None) -> int:
    from zoo_real.registry import entries

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of model names")
    parser.add_argument("--trace", action="store_true", help="print the traceback of failures")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [e for e in entries().values() if any(part in e.name for part in options.only)]
    missing = {e.name: e.missing for e in chosen if e.missing}
    good = bool(chosen)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for entry in (e for e in chosen if e.name not in missing):
        row, whole = passed(entry, options.trace)
        good = good and whole
        print(f"| {' | '.join(row)} |", flush=True)
    for name, package in missing.items():
        print(f"left out: {name} needs {package} (pip install 'qflow[zoo]')")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
