"""Forces factors on all channels that equalization may scale, in all real models: does the float function stay?

    python -m benchmarks.equalize_zoo [--only swin detr]

The models are those of tests/zoo_real. Prints for each the channels with a factor, the groups, the pairs of attention,
the largest relative difference of a float output with factors that are powers of two from 1/64 to 64 and, in float64
where the model can, with any from 1/100 to 100, and the most frequent reasons of what stays. Exits with 1 if an output
moves by more than 1e-5, or if a model cannot be followed. Models with temporal state are left out: a repair refuses
them.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

HEAD = ("model", "channels", "groups", "pairs", "moved: powers of two", "any factors", "seconds", "reasons")
SAME_FUNCTION = 1e-5


def row_of(entry: Any) -> tuple[tuple[str, ...], Any, float]:
    """(the row of a model, what its powers of two have done, the largest difference of an output)."""
    from support.forced_factors import any_factors, forced, powers_of_two

    from qflow import prepare
    from qflow.quant.trace.calling import map_named

    begun = time.perf_counter()
    model, inputs = entry.made()
    example = inputs(2)
    exact = forced(prepare(model, example), example, powers_of_two)
    if entry.double:
        model, example = model.double(), map_named(lambda _, t: t.double() if t.is_floating_point() else t, example)
    other = forced(prepare(model, example), example, any_factors)
    reasons = "; ".join(f"{count} {reason}" for reason, count in exact.reasons.most_common(4))
    row = (
        entry.name, str(exact.variables), str(len(exact.groups)), str(exact.pairs), f"{exact.moved:.1e}",
        f"{other.moved:.1e}", f"{time.perf_counter() - begun:.1f}", reasons,
    )  # fmt: skip
    return row, exact, max(exact.moved, other.moved)


def main(argv: Sequence[str] | None = None) -> int:
    from zoo_real.registry import entries

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of model names")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [e for e in entries().values() if any(part in e.name for part in options.only) and not e.cached_attrs]
    total: Counter[str] = Counter()
    failed, worst = not chosen, 0.0
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for entry in (e for e in chosen if not e.missing):
        try:
            row, exact, moved = row_of(entry)
        except Exception as error:  # a model may fail in any way; the table shows it
            row, exact, moved = (entry.name, *[""] * 6, " ".join(f"{type(error).__name__}: {error}".split())), None, 1.0
        print(f"| {' | '.join(row)} |", flush=True)
        failed, worst = failed or moved > SAME_FUNCTION, max(worst, moved)
        if exact is not None:
            total.update(models=1, channels=exact.variables, groups=len(exact.groups), pairs=exact.pairs)
    for entry in (e for e in chosen if e.missing):
        print(f"left out: {entry.name} needs {entry.missing} (pip install 'qflow[zoo]')")
    print(", ".join(f"{count} {what}" for what, count in total.items()) + f", largest difference {worst:.1e}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
