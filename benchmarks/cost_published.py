"""Board times of networks that others published (nash-m), and what the cost model says of them.

They are held out: no row of the fit, and no price, was chosen by their times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.cost_driving import Driving
from benchmarks.cost_networks import PIDNet, XFeat, Yolop
from benchmarks.cost_ocr import Recognizer
from benchmarks.cost_stereo import Stereo
from qflow.config.device_file import load_cost
from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph
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

    def graph(self) -> ModelGraph:
        """Its fused graph."""
        model = self.make().eval()
        inputs = tuple(torch.zeros(shape) for shape in self.shapes)
        return make_plan(trace(model, inputs), model).graph


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
    ),
)
