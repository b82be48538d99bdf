"""Board times of networks that others published (nash-m), and what the cost model says of them.

They are held out: no row of the fit, and no price, was chosen by their times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks.cost_driving import Driving
from benchmarks.cost_networks import PIDNet, XFeat, Yolop
from benchmarks.cost_ocr import Recognizer
from benchmarks.cost_stereo import Stereo
from qflow.config.device_file import load_cost, load_rules
from qflow.core.device import apply_rules
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.resolve import resolve
from qflow.core.setter import ModuleNameSetter, Setter, TemplateSetter
from qflow.cost_model.latency import Pricer
from qflow.cost_model.records import CostReport
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace

INT8, INT16 = TemplateSetter(QDtype.qint8), TemplateSetter(QDtype.qint16)


@dataclass(frozen=True)
class Published:
    """A network, the shapes of its inputs, and its published times in ms by precision."""

    name: str
    make: Callable[[], nn.Module]
    shapes: Sequence[tuple[int, ...]]
    times: Sequence[tuple[str, float]]
    """Precision (a key of `PRECISIONS`) and time."""
    float_outputs: bool = True
    """The publisher's configuration of the build keeps the conversion of the outputs to float."""

    def graph(self) -> ModelGraph:
        """Its fused graph; batch norms are folded first, as the tool chain does, since a module may be called twice."""
        model = self.make().eval()
        for chain in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
            _fold(chain)
        inputs = tuple(torch.zeros(shape) for shape in self.shapes)
        return make_plan(trace(model, inputs), model).graph


def _fold(chain: nn.Sequential) -> None:
    for i in range(len(chain) - 2, -1, -1):
        conv, norm = chain[i], chain[i + 1]
        if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)):
            chain[i] = fuse_conv_bn_eval(conv, norm, isinstance(conv, nn.ConvTranspose2d))
            del chain[i + 1]


def _mix(graph: ModelGraph) -> Setter:
    """LAS2-M's mix as its publisher names it: all int8, and the cost volume and the head in int16."""
    kept = ("features.", "aggregate.")
    outside = [n.name for n in graph.quantized if not n.name.startswith(kept)]
    return ModuleNameSetter(dict.fromkeys(outside, "qint16"))


PRECISIONS: dict[str, Callable[[ModelGraph], Sequence[Setter]]] = {
    "int8": lambda _: [INT8],
    "int16": lambda _: [INT16],
    "mix": lambda graph: [_mix(graph), INT8],
}
PUBLISHED = (
    Published("PIDNet-S, 1024 x 2048", PIDNet, [(1, 3, 1024, 2048)], [("int8", 4.52)]),
    Published("YOLOP, 640", Yolop, [(1, 3, 640, 640)], [("int8", 2.75)]),
    Published("XFeat, 480 x 640", XFeat, [(1, 1, 480, 640)], [("int8", 0.99)]),
    Published("PP-OCRv6 rec, 48 x 320", Recognizer, [(1, 3, 48, 320)], [("int16", 2.17)]),
    Published("PP-OCRv6 rec, 48 x 960", Recognizer, [(1, 3, 48, 960)], [("int16", 5.30)]),
    Published(
        "LAS2-M, 480 x 640",
        Stereo,
        [(1, 3, 480, 640)] * 2,
        [("int8", 1000 / 174), ("int16", 1000 / 71), ("mix", 1000 / 12)],
    ),
    Published(
        "DiffusionDrive R34, 256 x 1024",
        Driving,
        [(1, 3, 256, 1024), (1, 1, 256, 256), (1, 8), (1, 20, 8, 2)],
        [("int16", 14.37)],
        float_outputs=False,
    ),
)


def qconfig_of(graph: ModelGraph, precision: str) -> QConfig:
    """What OpenExplorer 3.7, which the publishers used, makes of a precision."""
    rules = replace(load_rules("nash-m-oe32"), fused_add_int8=False)
    return apply_rules(graph, resolve(graph, PRECISIONS[precision](graph), "nash-m"), rules)


def lines() -> list[str]:
    """A table of all published times: measured, predicted from the operators, and what is said of the prediction."""
    found = [
        "",
        "| network | precision | measured (ms) | BPU time | latency, interval | inside | with float outputs | said |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for network in PUBLISHED:
        graph = network.graph()
        pricer = Pricer(graph, load_cost("nash-m"))
        qconfigs = {precision: qconfig_of(graph, precision) for precision, _ in network.times}
        found += [_row(network, p, ms, pricer.report(qconfigs[p])) for p, ms in network.times]
        (first, base), *others = network.times
        for precision, ms in others:
            c = pricer.change(qconfigs[first], qconfigs[precision])
            report = pricer.report(qconfigs[precision])
            _, likely, high = report.boundary_ms
            ratios.append(
                f"{network.name}, {precision} over {first}: measured {ms / base:.2f}, predicted {c.ratio:.2f} "
                f"[{c.low:.2f}, {c.high:.2f}]; {report.boundaries} boundaries take {likely:.2f} ms, {high:.2f} at most"
            )
    return [*found, "", *ratios]


def _row(network: Published, precision: str, measured: float, report: CostReport) -> str:
    floats = report.float_output_ms if network.float_outputs else 0.0
    said = f"refused: {report.refusal}" if report.refusal else "; ".join(report.widened)
    latency = f"{report.latency_ms:.2f} [{report.low_ms:.2f}, {report.high_ms:.2f}]"
    more = f"up to {report.high_ms + floats:.2f}: {_inside(report, measured, floats)}" if floats else ""
    cells = [network.name, precision, f"{measured:.2f}", f"{report.bpu_ms:.2f}", latency]
    return f"| {' | '.join([*cells, _inside(report, measured), more, said])} |"


def _inside(report: CostReport, measured: float, floats: float = 0.0) -> str:
    return "yes" if report.low_ms <= measured <= report.high_ms + floats else "no"
