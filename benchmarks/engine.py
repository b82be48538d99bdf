"""Measures what fake quantization costs: `python -m benchmarks.engine [--rounds 15] [--only resnet20 unet]`.

Prints one markdown table: forward passes of a prepared model (quantizers off, all int8, int8 with every third operator
int16), a QAT step and a calibration pass, each over its float counterpart of the same round. It uses one thread and
process CPU time, so that other processes do not count, and does not time the first call. Variants take turns, so that a
slow phase affects all of them. A cell is the ratio of medians and, in brackets, the quartiles of the ratios by round.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.networks import NETWORKS, build, images
from qflow.core.dtype import QDtype
from qflow.core.qconfig import QConfig
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.model.quantized_model import QuantizedModel

SAMPLE_S = 0.02  # a timing lasts at least this long: short calls are repeated
COLUMNS = ("off", "int8", "int8+int16", "QAT step", "calibration")


@dataclass(frozen=True)
class Variant:
    """A call to time, and the context `state` around it, which is not timed."""

    call: Callable[[], object]
    state: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """CPU seconds per call, one value per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def against(self, base: Timing) -> str:
        """`1.23 (1.20-1.31)`: ratio of medians, quartiles of the ratios by round."""
        ratios = sorted(a / b for a, b in zip(self.rounds, base.rounds, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        return f"{self.median / base.median:.2f} ({low:.2f}-{high:.2f})"


def measure(variants: Mapping[str, Variant], rounds: int) -> dict[str, Timing]:
    """Time all variants in turn, `rounds` times; calls before that warm up and give the number of repeats."""
    repeats, taken = {}, {name: [] for name in variants}
    for name, variant in variants.items():
        _timed(variant, 1)
        repeats[name] = max(1, math.ceil(SAMPLE_S / max(_timed(variant, 1), 1e-6)))
    for _ in range(rounds):
        for name, variant in variants.items():
            taken[name].append(_timed(variant, repeats[name]))
    return {name: Timing(tuple(times)) for name, times in taken.items()}


def _timed(variant: Variant, repeats: int) -> float:
    with variant.state():
        variant.call()  # the first call quantizes the weights, which later calls of an evaluation reuse
        start = time.process_time()
        for _ in range(repeats):
            variant.call()
        return (time.process_time() - start) / repeats


def calibrated(model: nn.Module, x: Tensor, int16_every: int = 0) -> QuantizedModel:
    """`model` prepared and calibrated on `x`; every n-th operator is int16, the others int8."""
    prepared = prepare(model, x[:2])
    qconfig = resolve(prepared.graph, [TemplateSetter(QDtype.qint8)], "nash-m")
    if int16_every:
        int16 = resolve(prepared.graph, [TemplateSetter(QDtype.qint16)], "nash-m")
        names = list(qconfig.ops)[::int16_every]
        qconfig = QConfig(qconfig.march, {**qconfig.ops, **{name: int16.ops[name] for name in names}})
    apply_scales(prepared, collect(prepared, [(x, len(x))]), qconfig, CalibrationSettings())
    return prepared


@contextmanager
def _evaluating(prepared: QuantizedModel | None = None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if prepared is not None:
            stack.enter_context(prepared.quantized())
        yield


def forwards(model: nn.Module, x: Tensor) -> dict[str, Variant]:
    """Forward passes in float, and of the prepared model with its quantizers off, all int8, and mixed."""
    int8 = calibrated(model, x)
    mixed = calibrated(model, x, int16_every=3)
    return {
        "float": Variant(lambda: model(x), _evaluating),
        "off": Variant(lambda: int8(x), _evaluating),
        "int8": Variant(lambda: int8(x), lambda: _evaluating(int8)),
        "int8+int16": Variant(lambda: mixed(x), lambda: _evaluating(mixed)),
    }


def calibration(model: nn.Module, x: Tensor) -> dict[str, Variant]:
    """The calibration pass, which collects statistics for all calibration methods."""
    prepared = calibrated(model, x)
    return {"calibration": Variant(lambda: collect(prepared, [(x, len(x))]))}


def training(model: nn.Module, x: Tensor) -> dict[str, Variant]:
    """Forward, backward and an SGD step, float and with all quantizers on."""
    plain = copy.deepcopy(model).train()
    prepared = calibrated(model, x)
    prepared.train()
    return {
        "float step": Variant(_stepper(plain, x)),
        "QAT step": Variant(_stepper(prepared, x), prepared.quantized),
    }


def _stepper(model: nn.Module, x: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def row(name: str, model: nn.Module, x: Tensor, rounds: int, full: bool = True) -> list[str]:
    """Table cells of one network at one batch size; `full` adds calibration and the QAT step."""
    variants = forwards(model, x)
    if full:
        variants |= calibration(model, x)
        variants |= training(model, x)
    timings = measure(variants, rounds)
    cells = [name, str(len(x)), f"{timings['float'].median * 1e3:.2f} ms"]
    for column in COLUMNS:
        base = timings.get("float step") if column == "QAT step" else timings["float"]
        found = timings.get(column)
        cells.append(found.against(base) if found is not None and base is not None else "-")
    return cells


def table(rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    header = ["network", "batch", "float forward", *COLUMNS]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=["resnet20", "mobilenetv2", "unet"])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for name in options.only:
        _, shape, batch = NETWORKS[name]
        model = build(name)
        for size in (batch, 1):
            rows.append(row(name, model, images(size, shape, seed=5), options.rounds, full=size > 1))
    print(f"torch {torch.__version__}, one thread, {options.rounds} rounds; QAT step against a float training step.\n")
    print(table(rows))


if __name__ == "__main__":
    main()
