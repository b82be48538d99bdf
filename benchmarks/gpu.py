"""Compares a GPU with the CPU: `python -m benchmarks.gpu [--device cuda] [--only operators models study qat]`.

Four parts, each a table with the difference, the tolerance and the seconds:

- operators: one operator of each kind, in float, and in int8 with the CPU's scales (share of codes that differ);
- models: the zoo's sample (tests/zoo_real), calibrated and ranked on both devices;
- study: int8_int16 on digits with few trials, as a command on each device;
- qat: the digits network, trained for a few steps.

A GPU adds up in another order, so float results differ in the last bits, and a value near the middle between two codes
can move to the next one. TF32 is off. Exits with 1 if a difference exceeds its tolerance, and with 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qflow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

HEAD = ("part", "what", "compared", "difference", "tolerance", "seconds")
EXACT, SUM, FUNCTION = (0.0, 1e-3), (1e-4, 5e-3), (1e-5, 2e-3)
"""(relative difference in float, share of int8 codes that differ) of what is exact, adds up, or is approximated.

Codes differ even where float is exact: on a GPU the scale is a tensor, and its inverse is rounded to float32.
"""
MODEL_SCALES, MODEL_ERROR, MODEL_RANKS = 1e-3, 0.5, 0.95
STUDY_ACCURACY, QAT_LOSS = 0.01, 0.05


@dataclass(frozen=True)
class Row:
    """One comparison; `found` exceeds its `limit`, or (for ranks) falls below it."""

    part: str
    what: str
    compared: str
    found: float
    limit: float
    seconds: float
    least: bool = False

    @property
    def good(self) -> bool:
        return self.found >= self.limit if self.least else self.found <= self.limit

    def text(self) -> str:
        limit = f"{'>=' if self.least else '<='} {self.limit:g}{'' if self.good else ' EXCEEDED'}"
        cells = (self.part, self.what, self.compared, f"{self.found:.3g}", limit, f"{self.seconds:.1f}")
        return f"| {' | '.join(cells)} |"


class Function(nn.Module):
    """A function of the input as a module, between an input quantizer and its own."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def kinds() -> dict[str, tuple[nn.Module, tuple[int, ...], tuple[float, float]]]:
    """Kind of an operator -> (module, shape of its input, tolerances)."""
    torch.manual_seed(0)
    grid = torch.rand(1, 8, 8, 2) * 2 - 1
    image, rows = (4, 16, 24, 24), (4, 32, 64)

    def around(x: Tensor) -> Tensor:
        return grid.to(x).expand(len(x), -1, -1, -1)

    return {
        "conv": (nn.Conv2d(16, 32, 3, padding=1), image, SUM),
        "conv_transpose": (nn.ConvTranspose2d(16, 16, 2, 2), image, SUM),
        "linear": (nn.Linear(64, 64), rows, SUM),
        "matmul": (Function(lambda x: x @ x.transpose(1, 2)), rows, SUM),
        "norm": (nn.BatchNorm2d(16), image, FUNCTION),
        "layer_norm": (nn.LayerNorm(64), rows, FUNCTION),
        "relu": (nn.ReLU(), image, EXACT),
        "lut": (Function(lambda x: F.silu(x)), image, FUNCTION),
        "softmax": (nn.Softmax(-1), rows, FUNCTION),
        "add": (Function(lambda x: x + x.flip(1)), image, EXACT),
        "mul": (Function(lambda x: x * x.flip(1)), image, EXACT),
        "arithmetic": (Function(lambda x: x / (x.flip(1).abs() + 1.0)), image, FUNCTION),
        "concat": (Function(lambda x: torch.cat([x, x.flip(1)], 1)), image, EXACT),
        "resize": (nn.Upsample(scale_factor=2, mode="bilinear"), image, FUNCTION),
        "max_pool": (nn.MaxPool2d(2), image, EXACT),
        "avg_pool": (nn.AvgPool2d(2), image, FUNCTION),
        "grid_sample": (Function(lambda x: F.grid_sample(x, around(x), align_corners=False)), image, FUNCTION),
        "reduce": (Function(lambda x: x.mean((2, 3))), image, SUM),
    }


def on(device: str, value: Any) -> Any:
    from zoo_real.through import to

    return to(device, value)


def relative(expected: Tensor, found: Tensor) -> float:
    expected, found = expected.double().cpu(), found.double().cpu()
    return float((expected - found).norm() / expected.norm().clamp(min=1e-12))


def operators(device: str) -> Iterator[Row]:
    """Float results, and the codes that the CPU's scales give on each device."""
    for kind, (module, shape, (close, codes)) in kinds().items():
        begun = time.perf_counter()
        model, x = nn.Sequential(module).eval(), torch.randn(shape)
        prepared = qflow.prepare(model, x)
        qflow.configure(prepared, qflow.TemplateSetter("qint8"))  # a GEMM at the end would have no quantizer
        qflow.calibrate(prepared, [x])
        with torch.no_grad():
            expected, quantized = model(x), prepared(x)
            state, twin, y = prepared.state_dict(), model.to(device), x.to(device)
            other = qflow.prepare(twin, y)
            other.load_state_dict(state)
            yield Row("operators", kind, "float", relative(expected, twin(y)), close, 0.0)
            moved = (quantized - other(y).cpu()).abs() > 1e-6 * quantized.abs().max()
        yield Row("operators", kind, "codes", float(moved.float().mean()), codes, time.perf_counter() - begun)


def models(device: str) -> Iterator[Row]:
    """Scales of a calibration on each device; outputs under the same scales; the ranking of sensitivities."""
    from zoo_real.registry import entries
    from zoo_real.through import Passage, distance

    for entry in (e for e in entries().values() if e.sample and not e.missing):
        begun = time.perf_counter()
        ways = [Passage(entry), Passage(entry, device)]
        for way in ways:
            way.data = on(way.device, ways[0].data)
            way.run("calibrate")
        own, other = (qflow.scales(way.prepared) for way in ways)
        pairs = [(torch.as_tensor(own[name]), torch.as_tensor(other[name])) for name in own]
        scales = max(float(((a - b).abs() / a.abs().clamp(min=1e-12)).max()) for a, b in pairs)
        yield Row("models", entry.name, "scales", scales, MODEL_SCALES, 0.0)
        for way in ways:
            way.run("sensitivity")
        first, second = ([r.score for r in sorted(w.table.rows, key=_key)] for w in ways)
        yield Row("models", entry.name, "ranks", correlation(first, second), MODEL_RANKS, 0.0, least=True)
        ways[1].prepared.load_state_dict(ways[0].prepared.state_dict())
        with torch.no_grad():
            expected, plain = ways[0].outputs(ways[0].prepared), ways[0].outputs(ways[0].model)
            found = [(name, x.cpu()) for name, x in ways[1].outputs(ways[1].prepared)]
        share = distance(expected, found) / distance(plain, expected)
        yield Row(
            "models", entry.name, "outputs, of the quantization error", share, MODEL_ERROR, time.perf_counter() - begun
        )


def _key(row: Any) -> tuple[str, str]:
    return row.op_name, row.sensitive_type


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; 1 for equal lists."""
    if list(a) == list(b):
        return 1.0
    ranks = torch.tensor([a, b], dtype=torch.float64).argsort(1).argsort(1).double()
    return float(torch.corrcoef(ranks)[0, 1])


def study(device: str) -> Iterator[Row]:
    """Accuracies that the command prints for float, all-int8 and all-int16."""
    begun, found = time.perf_counter(), []
    for own in ("cpu", device):
        with tempfile.TemporaryDirectory() as folder:
            arguments = ["+experiment=int8_int16", "task=digits", "+debug=tiny", f"executor.device={own}"]
            command, env = [sys.executable, "-m", "qflow.tune", *arguments], {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, env=env)
        lines = re.findall(r"^(float|all-int8|all-int16) +(\d\.\d+)", done.stdout, re.MULTILINE)
        assert {name for name, _ in lines} == {"float", "all-int8", "all-int16"}, done.stdout + done.stderr
        found.append({name: float(value) for name, value in lines})
    for name, value in found[0].items():
        gap = abs(value - found[1][name])
        yield Row("study", "digits", f"accuracy of {name}", gap, STUDY_ACCURACY, time.perf_counter() - begun)


def qat(device: str) -> Iterator[Row]:
    """The losses of a few steps of QAT from the same calibration."""
    from qflow.tasks.digits import build_data, build_model

    begun, ends = time.perf_counter(), []
    for own in ("cpu", device):
        torch.manual_seed(0)
        model, data = build_model().eval().to(own), build_data(calibration_size=64).calibration
        images = torch.stack([data[i][0] for i in range(64)]).to(own)
        labels = torch.tensor([int(data[i][1]) for i in range(64)]).to(own)
        prepared = qflow.prepare(model, images)
        qflow.calibrate(prepared, [images])
        losses: list[float] = []

        def loss(outputs: Tensor, item: Any, losses: list[float] = losses) -> Tensor:
            value = F.cross_entropy(outputs, item[1])
            losses.append(float(value.detach()))
            return value

        qflow.train(prepared, [(images, labels)], loss, steps=20, learning_rate=1e-3)
        ends.append(sum(losses[-5:]) / 5)
    gap = abs(ends[0] - ends[1]) / max(abs(ends[0]), 1e-6)
    yield Row("qat", "digits", "loss of the last steps", gap, QAT_LOSS, time.perf_counter() - begun)


PARTS = {"operators": operators, "models": models, "qat": qat, "study": study}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda", help="what is compared with the CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("A GPU is compared with the CPU, but got a machine without one. Run it where torch sees CUDA.")
        return 2
    warnings.simplefilter("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    good = True
    for part in options.only:
        for row in PARTS[part](options.device):
            good = good and row.good
            print(row.text(), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
