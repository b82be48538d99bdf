"""Compares the engine with onnxruntime, operator by operator: `python -m benchmarks.onnx_witness [--only digits swin]`.

Networks: the built-in tasks, trained, on their calibration data, and the sample of tests/zoo_real (with `--only`: any);
each as int8, and as a mix of int8, int16 and fp16. Each operator is computed by onnxruntime from our own codes, without
optimizations (`plain`), with them (`fused`), and with integer kernels on int8 codes (`integer`), and its codes are
compared with ours. Prints a table by operator kind for each network: the share of equal codes, how many differ by one
and by more, and how far from a rounding tie our value was where they differ. Exits with 1 if a code differs by more
than one. A network that cannot be exported is named and left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import qflow
from qflow.config.device_file import load_rules
from qflow.core.dtype import QDtype
from qflow.export.contract import ExportError

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MIXES = ("int8", "mixed")
BATCH = 2


TASKS = {
    "digits": ("digits", "digits"),
    "dual": ("dual", "digits"),
    "exposure": ("exposure", "exposure"),
    "perception": ("perception.model", "perception.data"),
    "temporal": ("temporal", "temporal"),
}
"""Built-in task -> the modules of its model and its data."""
STATE = {"temporal": ("hidden",)}


def built(task: str) -> tuple[Any, Any, tuple[str, ...]]:
    """The trained model of a built-in task, a batch of its calibration data, and the attributes with its state."""
    model, data = (importlib.import_module(f"qflow.tasks.{module}") for module in TASKS[task])
    samples = data.build_data(calibration_size=640 if task in STATE else 32).calibration
    return model.build_model(), torch.stack([samples[i][0] for i in range(16)]), STATE.get(task, ())


def networks(only: Sequence[str]) -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    """(name, float model, a batch of inputs, attributes with state) of the networks whose name has a part in `only`."""
    from zoo_real.registry import entries

    for name in (name for name in TASKS if not only or any(part in name for part in only)):
        yield name, *built(name)
    for name, entry in entries().items():
        if (any(part in name for part in only) if only else entry.sample) and not entry.missing:
            model, inputs = entry.made()
            yield name, model, inputs(BATCH), entry.cached_attrs


def mixed(prepared: qflow.Prepared) -> None:
    """Every third operator that can be fp16 is, every third of all int16, the others int8."""
    from qflow.core.setter import ChosenSetter

    taken = load_rules(prepared.march).float16_kinds
    wide = [node.name for node in prepared.graph.quantized][::3]
    half = [node.name for node in prepared.graph.quantized if node.kind in taken][::3]
    setters = [ChosenSetter(half, QDtype.float16, "mixed"), ChosenSetter(wide, QDtype.qint16, "mixed")]
    qflow.configure(prepared, [*setters, qflow.TemplateSetter(QDtype.qint8)])


def rows(name: str, mix: str, prepared: qflow.Prepared, inputs: Any) -> tuple[list[tuple[str, ...]], bool]:
    """The table of one network, and whether no code differs by more than one."""
    from support.onnx_witness import by_kind, compare

    begun, found, good = time.perf_counter(), [], True
    for runtime, comparison in compare(prepared, inputs).items():
        for kind, d in by_kind(prepared, comparison.forced).items():
            good = good and not d.more
            cells = (
                f"{d.equal:.4%}",
                str(d.count),
                str(d.one),
                str(d.more),
                f"{d.off_tie:.1e}" if d.one + d.more else "",
            )
            found.append((name, mix, runtime, kind, *cells))
        chained = by_kind(prepared, comparison.chained).values()
        share = sum(d.count * d.equal for d in chained) / max(1, sum(d.count for d in chained))
        print(
            f"{name} {mix} {runtime}: {comparison.integer_kernels} integer kernels, chained {share:.4%} equal, outputs "
            f"differ by up to {max(comparison.outputs.values()):.1e}, {time.perf_counter() - begun:.0f} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    return found, good


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names of tasks and zoo networks")
    parser.add_argument("--mix", nargs="*", default=list(MIXES), choices=MIXES)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    good = True
    print("| network | mix | runtime | kind | equal | codes | by one | by more | off the tie |\n|" + "---|" * 9)
    for name, model, inputs, attrs in networks(options.only):
        for mix in options.mix:
            prepared = qflow.prepare(model, inputs, cached_attrs=attrs)
            if mix == "mixed":
                mixed(prepared)
            qflow.calibrate(prepared, [inputs])
            try:
                found, whole = rows(name, mix, prepared, inputs)
            except ExportError as error:
                print(f"left out: {name} {mix}: {error}", file=sys.stderr, flush=True)
                continue
            good = good and whole
            for row in found:
                print(f"| {' | '.join(row)} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
