"""Time that users wait, on real networks: `python -m benchmarks.real_models [--only vit_tiny] [--stages layers exact]`.

Prints one markdown table. The unit is one float forward pass of the same batch (FFE), in process CPU time on one
thread, measured in the same round; a cell is the median of the rounds. Stages:

    prepare, prepare1   `prepare` on the batch, and on one sample (FFE of that sample); in brackets the seconds that it
                        takes beyond four forwards
    calibration         a calibration pass over a batch, which collects the statistics of every method
    forward             a pass of the calibrated model with all quantizers on: no column of the others can be below it
    layers              the layer table
    exact, screened     a sensitivity table of all int8 quantizers, FFE a row; in brackets how it was measured
    behind              mean share of the products of convolutions and linear layers that lie behind a quantizer: what
                        an exact row has to compute, in any case, at the speed of the float forward
    naive               a full pass with one quantizer on, the mean of four rows: what a row costs without a replay
    fx                  torch.ao's graph mode: `prepare_fx`, and a calibration pass with its default histograms of
                        activations (and no statistics for other methods); "-" where it cannot trace the network

Needs timm, torchvision and transformers (`make zoo`).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.real_networks import NETWORKS, build
from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.core.settings import CalibrationSettings, SensitivitySettings
from qflow.process.allocator import keep_freed_memory
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.capture import capture
from qflow.quant.replay.fused import FoldedOps
from qflow.quant.replay.replay import full_forward
from qflow.quant.trace.calling import call_model, cut

STAGES = ("prepare", "prepare1", "calibration", "forward", "layers", "exact", "screened", "behind", "naive", "fx")


@dataclass
class Subject:
    """A network, a batch of its inputs, and the calibrated model that all stages share."""

    model: nn.Module
    inputs: Any
    batch: int
    prepared: QuantizedModel
    notes: dict[str, str] = field(default_factory=dict)
    """Stage -> how its figure came about."""

    def forward(self, inputs: Any) -> float:
        """CPU seconds of a float forward, median of three."""
        with torch.no_grad():
            return statistics.median(seconds(lambda: call_model(self.model, inputs)) for _ in range(3))


def subject(name: str, batch: int) -> Subject:
    """Build a network, prepare and calibrate it, all int8."""
    model, inputs = build(name, batch)
    prepared = prepare(model, cut(inputs, batch, 0, min(batch, 2)))
    qconfig = resolve(prepared.graph, [TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, [(inputs, batch)]), qconfig, CalibrationSettings())
    return Subject(model, inputs, batch, prepared)


def seconds(call: Callable[[], Any]) -> float:
    """CPU time of a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def _prepare(s: Subject) -> tuple[float, str]:
    return _beyond(s, s.inputs)


def _prepare1(s: Subject) -> tuple[float, str]:
    return _beyond(s, cut(s.inputs, s.batch, 0, 1))


def _beyond(s: Subject, inputs: Any) -> tuple[float, str]:
    unit = s.forward(inputs)
    spent = seconds(lambda: prepare(s.model, inputs))
    return spent / unit, f"{spent - 4 * unit:+.2f} s"


def _calibration(s: Subject) -> tuple[float, str]:
    unit = s.forward(s.inputs)
    return seconds(lambda: collect(s.prepared, [(s.inputs, s.batch)])) / unit, ""


def _forward(s: Subject) -> tuple[float, str]:
    unit = s.forward(s.inputs)
    with torch.no_grad(), s.prepared.quantized():
        call_model(s.prepared, s.inputs)
        return seconds(lambda: call_model(s.prepared, s.inputs)) / unit, ""


def _layers(s: Subject) -> tuple[float, str]:
    unit = s.forward(s.inputs)
    return seconds(lambda: compare_layers(s.model, s.prepared, s.inputs)) / unit, ""


def _ranked(s: Subject, method: str) -> tuple[float, str]:
    unit, rows = s.forward(s.inputs), candidates(s.prepared)
    found: list[Any] = []
    settings = SensitivitySettings(method=method)
    spent = seconds(lambda: found.append(sensitivity(s.model, s.prepared, [s.inputs], settings=settings, rows=rows)))
    table = found[0]
    given_up = [f.message for f in table.findings if "given up" in f.message or "at a time" in f.message]
    s.notes[method] = "; ".join(given_up)
    how = "forwards" if "full forwards" in table.method else "one by one" if given_up else "replay"
    return spent / unit / len(rows), f"{len(rows)} rows, {how}"


def _behind(s: Subject) -> tuple[float, str]:
    ops = FoldedOps(s.model, s.prepared, capture(s.model, s.prepared.plan, s.inputs, math.inf))
    products = {node.name: node.macs for node in s.prepared.graph.weighted}
    whole = sum(products.get(op.name, 0) for op in ops.ops)
    shares = []
    for row in candidates(s.prepared):
        patches = ops.of(row.variant)
        moved = {patch.at for patch in patches}
        run = {patch.op for patch in patches if patch.kind != "result"}
        for op in ops.ops:
            if ops.reads[op.index] & moved:
                moved.add(op.index)
                run.add(op.index)
        shares.append(sum(products.get(op.name, 0) for op in ops.ops if op.index in run) / whole)
    return statistics.mean(shares), ""


def _naive(s: Subject) -> tuple[float, str]:
    unit, rows = s.forward(s.inputs), candidates(s.prepared)
    some = rows[:: max(1, len(rows) // 4)][:4]
    with torch.no_grad():
        spent = seconds(lambda: [full_forward(s.prepared, s.inputs, row.variant) for row in some])
    return spent / unit / len(some), ""


def _fx(s: Subject) -> tuple[float, str]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    unit, made = s.forward(s.inputs), []
    example = tuple(s.inputs.values()) if isinstance(s.inputs, dict) else (s.inputs,)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        mapping = get_default_qconfig_mapping("x86")
        spent = seconds(lambda: made.append(prepare_fx(copy.deepcopy(s.model), mapping, example)))
        calibrating = seconds(lambda: call_model(made[0], s.inputs))
    s.notes["fx"] = f"calibration {calibrating / unit:.1f}"
    return spent / unit, f"calibration {calibrating / unit:.1f}"


MEASURES: dict[str, Callable[[Subject], tuple[float, str]]] = {
    "prepare": _prepare,
    "prepare1": _prepare1,
    "calibration": _calibration,
    "forward": _forward,
    "layers": _layers,
    "exact": lambda s: _ranked(s, "exact"),
    "screened": lambda s: _ranked(s, "screened"),
    "behind": _behind,
    "naive": _naive,
    "fx": _fx,
}


def cell(s: Subject, stage: str, rounds: int) -> str:
    """The median of a stage over the rounds."""
    try:
        found = [MEASURES[stage](s) for _ in range(rounds)]
    except Exception as error:
        if stage != "fx":
            raise
        s.notes["fx"] = " ".join(str(error).split())[:160]
        return "-"
    middle = sorted(found)[len(found) // 2]
    return f"{middle[0]:.2f}" + (f" ({middle[1]})" if middle[1] else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=[n for n in NETWORKS if n != "tiny"])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # as qflow's commands do
    header = ["network", "FFE", *options.stages]
    print(f"torch {torch.__version__}, one thread, batch {options.batch}, {options.rounds} rounds.\n")
    print(f"| {' | '.join(header)} |\n| {' | '.join(['---'] * len(header))} |", flush=True)
    notes = []
    for name in options.only:
        s = subject(name, options.batch)
        cells = [
            name,
            f"{s.forward(s.inputs) * 1e3:.0f} ms",
            *(cell(s, stage, options.rounds) for stage in options.stages),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)
        notes += [f"{name}, {stage}: {text}" for stage, text in s.notes.items() if text]
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
