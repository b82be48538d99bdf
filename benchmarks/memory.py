"""Measures the peak memory of an analysis: `python -m benchmarks.memory [--height 512 --width 960] [--memory-mb 1024]`.

The network has 300 quantizers (75 residual blocks of two convolutions, after a stem of stride 2) and the guide's input
size. A float forward pass, the layer comparison, the sensitivity of a few quantizers from the first to the last, and an
estimate of all each run in a process of their own. The benchmark prints how much the peak resident memory exceeds that
of the float forward pass, next to the bound `sensitivity.memory_mb`.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.engine import calibrated
from benchmarks.networks import Residual, revive
from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.sensitivity.candidates import candidates
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.settings import SensitivitySettings

STAGES = ("float", "layers", "sensitivity", "estimate")
ROWS = 8


class Deep(nn.Module):
    """Stem of stride 2, then 75 residual blocks of two convolutions on 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        plan = [(16, 16, 1)] * 25 + [(16, 32, 2)] + [(32, 32, 1)] * 24 + [(32, 64, 2)] + [(64, 64, 1)] * 24
        self.blocks = nn.Sequential(*(Residual(*row) for row in plan))
        self.head = nn.Conv2d(64, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def peak_mb() -> float:
    """Largest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(stage: str, height: int, width: int, memory_mb: int) -> None:
    """Run one stage; prints the number of quantizers, and MB of all float values and of the peak."""
    torch.manual_seed(0)
    small = torch.randn(2, 3, 64, 96)
    model = revive(Deep(), small)
    prepared = calibrated(model, small)
    image = torch.randn(1, 3, height, width)
    rows = candidates(prepared)
    with torch.no_grad():
        model(image)
    if stage == "layers":
        compare_layers(model, prepared, image, memory_mb=memory_mb)
    elif stage == "sensitivity":
        chosen = [rows[i * (len(rows) - 1) // (ROWS - 1)] for i in range(ROWS)]
        sensitivity(model, prepared, [image], settings=SensitivitySettings(memory_mb=memory_mb), rows=chosen)
    elif stage == "estimate":
        settings = SensitivitySettings(memory_mb=memory_mb, method="estimate", draws=1)
        sensitivity(model, prepared, [image], settings=settings, rows=rows)
    scale = height * width / (64 * 96) / 2
    values = sum(node.elements for node in prepared.graph.nodes) * 4 * scale / 1e6
    print(len(rows), round(values), round(peak_mb()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--width", type=int, default=960)
    parser.add_argument("--memory-mb", type=int, default=1024)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.stage:
        run(options.stage, options.height, options.width, options.memory_mb)
        return
    base = 0
    for stage in STAGES:
        command = [sys.executable, "-m", "benchmarks.memory", "--stage", stage, "--height", str(options.height)]
        command += ["--width", str(options.width), "--memory-mb", str(options.memory_mb)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        quantizers, values, peak = map(int, out)
        base = base or peak
        print(
            f"{stage:<12} {quantizers} quantizers, float values {values} MB; peak {peak} MB, {peak - base} MB above a "
            f"float forward, bound {options.memory_mb} MB"
        )


if __name__ == "__main__":
    main()
