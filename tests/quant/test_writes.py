"""Writes through views reach whatever shares the memory, and views of one parameter have scales of their own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.errors import ModelError


def image():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 2, 1)


class SampleBySample(Two):
    def forward(self, x):
        y = F.silu(self.a(x))
        for i in range(len(y)):
            y[i][:4] = self.b(x)[i]
        return self.out(y)


class StaleView(Two):
    def forward(self, x):
        y = F.silu(self.a(x))
        view = y.flatten(2)
        y[:, :4].add_(torch.sigmoid(self.b(x)))
        return self.out(view.view_as(y))


class Pillars(Two):
    """A canvas of fresh zeros, filled through two views."""

    def forward(self, x):
        features = F.relu(self.a(x)).flatten(2) + self.b(x).flatten(2).repeat(1, 2, 1)
        canvas = torch.zeros(x.shape[0], 8, 400)
        for i in range(x.shape[0]):
            canvas[i][:, : features.shape[2]] = features[i]
        return self.out(canvas.view(-1, 8, 20, 20))


class PillarsCopied(Two):
    def forward(self, x):
        features, canvas = F.relu(self.a(x)).flatten(2), torch.zeros(x.shape[0], 8, 400)
        canvas[:, :, : features.shape[2]].copy_(features + self.b(x).flatten(2).repeat(1, 2, 1))
        return self.out(canvas.view(-1, 8, 20, 20))


@pytest.mark.parametrize("kind", [SampleBySample, StaleView, Pillars, PillarsCopied])
def test_nothing_that_is_written_through_a_view_is_declared_dead(kind):
    prepared = qflow.prepare(kind().eval(), image())
    qflow.calibrate(prepared, [image()])
    assert not any("no output depends on it" in note for note in prepared.graph.notes)
    assert {"a", "b", "out"} <= set(prepared.weights) & {node.weight for node in prepared.graph.weighted}
    with torch.no_grad(), prepared.quantized():
        prepared(image())
        assert {q.name for q in prepared._keys().values() if q.active} <= prepared.ran
    graph = prepared.graph
    upstream, stack = set(), ["out"]
    while stack:
        stack += [s for s in graph.by_name[stack.pop()].inputs if s not in upstream and not upstream.add(s)]
    assert any(graph.by_name[name].weight == "b" for name in upstream)


def test_an_operator_that_runs_once_a_sample_is_refused():
    class Loop(Two):
        def forward(self, x):
            return self.out(torch.stack([F.silu(y) for y in self.a(x)]))

    with pytest.raises(ModelError, match=r"but got \[silu\] at test_writes.py:\d+ that was not traced"):
        qflow.prepare(Loop().eval(), image())


def test_disjoint_slices_do_not_reach_each_other():
    class Halves(Two):
        def forward(self, x):
            first, second = F.silu(self.a(x)).chunk(2, 1)
            first.add_(self.b(x))
            return self.out(torch.cat([second, second], 1)), first

    prepared = qflow.prepare(Halves().eval(), image())
    assert prepared.graph.sources("out") == ("[cat]",)
    assert prepared.graph.sources("[cat]") == ("[silu]",)


def relative(model, prepared, x):
    with torch.no_grad():
        return float((model(x) - prepared(x)).norm() / model(x).norm())


class Slices(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.cat([torch.randn(8, 6), 100 * torch.randn(8, 6)]))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(F.relu(F.linear(x, self.w[:8])) + F.linear(x, self.w[8:]) * 0.01)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(8, 8) * torch.logspace(-3, 0, 8)[:, None])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.linear(F.relu(F.linear(x, self.w)), self.w.t()))


@pytest.mark.parametrize(("kind", "width"), [(Slices, 6), (Tied, 8)])
def test_views_of_one_parameter_have_a_weight_quantizer_each(kind, width):
    model, x = kind().eval(), torch.randn(16, width)
    prepared = qflow.prepare(model, x)
    qflow.calibrate(prepared, [x])
    assert len(prepared.weights) == 3
    assert ("w" in prepared.weights) == (kind is Tied)  # the parameter itself keeps its name
    assert relative(model, prepared, x) < 0.05


def test_an_out_argument_is_quantized_where_it_lies():
    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.o = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x):
            held = torch.ones(x.shape[0], 8)
            torch.add(self.a(x), 1.0, out=held)
            return self.o(held), held

    x = torch.randn(64, 3)
    prepared = qflow.prepare(Out().eval(), x)
    qflow.calibrate(prepared, [x])
    assert not any(node.kind == "constant" for node in prepared.graph.nodes)
    with torch.no_grad():
        _, held = prepared(x)
    codes = held / prepared.outputs["[add]"].scale
    assert torch.allclose(codes, codes.round(), atol=1e-3)


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.o(torch.cat([torch.clamp(self.a(x), min=0)[:, :4], (x[:, :1] + 1.0).expand(-1, 4)], 1))


class Written(Given):
    def forward(self, x):
        held, both, plus = (torch.empty(x.shape[0], size) for size in (8, 8, 1))
        torch.clamp(self.a(x), min=0, out=held)
        torch.add(x[:, :1], 1.0, out=plus)
        return self.o(torch.cat([held[:, :4], plus.expand(-1, 4)], 1, out=both))


def test_out_arguments_are_replayed_as_what_they_hold():
    x, tables = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)), []
    for kind in (Given, Written):
        model = kind().eval()
        prepared = qflow.prepare(model, x)
        qflow.calibrate(prepared, [x])
        table = sensitivity(model, prepared, [x])
        assert not table.findings
        tables.append([(row.op_name, row.sensitive_type, row.score) for row in table.rows])
    assert tables[0] == tables[1]
