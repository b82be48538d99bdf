"""Perception networks in plain torch, and an ONNX file: idioms of detection, lidar, bird's-eye view and text."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from zoo_real.registry import Entry, images

ACTIVATION = nn.SiLU()  # one object for all layers, as YOLO's Conv has it as a class attribute


class ConvNorm(nn.Module):
    """Convolution, batch norm, the shared activation."""

    def __init__(self, inner, outer, kernel=1, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outer)
        self.act = ACTIVATION

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Split(nn.Module):
    """Cross-stage block: half of the channels pass through bottlenecks, and every stage enters the concat."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = ConvNorm(width, width), ConvNorm(width * 2, width)
        self.blocks = nn.ModuleList(nn.Sequential(ConvNorm(width // 2, width // 2, 3)) for _ in range(2))

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]) + parts[-1])
        return self.last(torch.cat(parts, 1))


class Yolo(nn.Module):
    """Pooled pyramid, upsampling by nearest neighbour, distribution heads on two levels decoded with anchors."""

    def __init__(self, classes=3, bins=4):
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, 8, 3, 2), ConvNorm(8, 16, 3, 2), Split(16))
        self.down = nn.Sequential(ConvNorm(16, 32, 3, 2), Split(32))
        self.pool, self.pooled = nn.MaxPool2d(5, 1, 2), ConvNorm(96, 32)
        self.up, self.fuse = nn.Upsample(scale_factor=2, mode="nearest"), ConvNorm(48, 16)
        self.box = nn.ModuleList(nn.Conv2d(width, 4 * bins, 1) for width in (16, 32))
        self.cls = nn.ModuleList(nn.Conv2d(width, classes, 1) for width in (16, 32))
        self.expectation = nn.Conv2d(bins, 1, 1, bias=False)
        self.expectation.weight.data.copy_(torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1))
        self.bins = bins

    def forward(self, x):
        fine = self.stem(x)
        coarse = self.down(fine)
        once = self.pool(coarse)
        coarse = self.pooled(torch.cat([coarse, once, self.pool(once)], 1))
        fine = self.fuse(torch.cat([self.up(coarse), fine], 1))
        boxes, scores = [], []
        for level, box, cls in zip((fine, coarse), self.box, self.cls, strict=True):
            boxes.append(box(level).flatten(2))
            scores.append(cls(level).flatten(2))
        boxes, scores = torch.cat(boxes, 2), torch.cat(scores, 2)
        n, _, anchors = boxes.shape
        spread = boxes.view(n, 4, self.bins, anchors).transpose(1, 2).softmax(1)
        return self.expectation(spread).view(n, 4, anchors), scores.sigmoid()


class Pillars(nn.Module):
    """Point features, the maximum of each pillar, then a canvas that is filled sample by sample in a loop."""

    def __init__(self, side=8):
        super().__init__()
        self.side = side
        self.points = nn.Sequential(nn.Linear(4, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU())
        self.neck = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.heads = nn.ModuleDict({"heat": nn.Conv2d(16, 2, 1), "box": nn.Conv2d(16, 6, 1)})

    def forward(self, points, cells):
        n, pillars, per, _ = points.shape
        found = self.points(points.flatten(0, 2)).view(n, pillars, per, 16).amax(2)
        canvases = []
        for sample in range(n):
            canvas = torch.zeros(16, self.side * self.side, dtype=found.dtype, device=found.device)
            canvas[:, cells[sample]] = found[sample].t()
            canvases.append(canvas)
        x = self.neck(torch.stack(canvases).view(n, 16, self.side, self.side))
        return {name: head(x) for name, head in self.heads.items()}


def pillars(batch):
    cells = torch.stack([torch.randperm(64)[:20] for _ in range(batch)])
    return {"points": torch.randn(batch, 20, 6, 4), "cells": cells}


class LiftSplat(nn.Module):
    """Camera features times a depth distribution, summed into bird's-eye cells by a sorted running sum."""

    def __init__(self, depths=4, width=8, side=6, cameras=2, size=4):
        super().__init__()
        self.depths, self.width, self.side, self.cameras = depths, width, side, cameras
        self.image = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.lift = nn.Conv2d(16, depths + width, 1)
        self.bev = nn.Sequential(nn.Conv2d(width, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))
        cells, self.order = torch.randint(0, side * side, (cameras * depths * size * size,)).sort()
        self.register_buffer("cells", cells, persistent=False)
        self.register_buffer("last", torch.cat([cells[1:] != cells[:-1], torch.tensor([True])]), persistent=False)

    def forward(self, cameras):
        n = cameras.shape[0]
        x = self.lift(self.image(cameras.flatten(0, 1)))
        depth, context = x[:, : self.depths].softmax(1), x[:, self.depths :]
        volume = depth.unsqueeze(1) * context.unsqueeze(2)
        volume = volume.view(n, self.cameras, self.width, -1).permute(0, 1, 3, 2).reshape(n, -1, self.width)
        total = volume[:, self.order].cumsum(1)[:, self.last]
        total = torch.cat([total[:, :1], total[:, 1:] - total[:, :-1]], 1)
        grid = torch.zeros(n, self.side * self.side, self.width, dtype=x.dtype, device=x.device)
        grid[:, self.cells[self.last]] = total
        return self.bev(grid.transpose(1, 2).reshape(n, self.width, self.side, self.side))


class Crnn(nn.Module):
    """Convolutions that collapse the height, a recurrent layer over the width, a class for each column."""

    def __init__(self, cell):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(True), nn.MaxPool2d((4, 1)),
        )  # fmt: skip
        self.recurrent = cell(32, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, line):
        x = self.conv(line).flatten(1, 2).transpose(1, 2)
        return self.head(self.recurrent(x)[0]).log_softmax(-1)


def onnx_file():
    """A residual network as an exporter writes it: weights in initializers, a fixed batch, a Resize and a Concat."""
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from qflow.tasks.onnx_model import load

    rng = numpy.random.default_rng(0)
    held = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (4, 16, 1, 1), "b3": (4,)}
    weights = [numpy_helper.from_array(rng.normal(0, 0.3, shape).astype("float32"), n) for n, shape in held.items()]
    weights.append(numpy_helper.from_array(numpy.array([1, 1, 2, 2], dtype="float32"), "double"))
    padded = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="stem", **padded),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="block", **padded),
        helper.make_node("Add", ["c2", "r1"], ["a"], name="add"),
        helper.make_node("HardSigmoid", ["a"], ["g"], name="gate"),
        helper.make_node("Mul", ["a", "g"], ["m"], name="mul"),
        helper.make_node("MaxPool", ["m"], ["p"], name="pool", kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Resize", ["p", "", "double"], ["u"], name="up", mode="nearest"),
        helper.make_node("Concat", ["u", "r1"], ["t"], name="cat", axis=1),
        helper.make_node("Conv", ["t", "w3", "b3"], ["y"], name="head"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 16, 16]) for n, c in (("x", 3), ("y", 4))]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], weights)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
        return load(path), images(16, 16)


ENTRIES = (
    Entry("yolo_shared_activation", lambda: (Yolo(), images(64, 64))),
    Entry("point_pillars", lambda: (Pillars(), pillars)),
    Entry("lift_splat", lambda: (LiftSplat(), lambda batch: torch.randn(batch, 2, 3, 16, 16))),
    Entry("crnn_lstm", lambda: (Crnn(nn.LSTM), lambda batch: torch.randn(batch, 1, 16, 24)), sample=False),
    Entry("crnn_gru", lambda: (Crnn(nn.GRU), lambda batch: torch.randn(batch, 1, 16, 24)), sample=False),
    Entry("onnx_file", onnx_file, ("onnx", "onnx2torch", "torchvision")),
)
