"""Fusion after the plugin's table (1.2), and every reason for which two operators stay apart."""

import pytest
import torch
import torch.nn.functional as F
from support.models import revive
from torch import nn

from qflow.quant.model.prepare import prepare

BASES = {
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d, (2, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d, (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d, (2, 4, 4, 4, 4)),
    "deconv": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), nn.BatchNorm2d, (2, 4, 6, 6)),
    "linear": (lambda: nn.Linear(4, 4), nn.BatchNorm1d, (2, 4)),
}


class Group(nn.Module):
    """base, then the wanted suffixes in the plugin's order."""

    def __init__(self, base, norm, add, act):
        super().__init__()
        self.base, self.norm, self.add, self.act = base, norm, add, act

    def forward(self, x):
        y = self.base(x)
        y = self.norm(y) if self.norm is not None else y
        y = y + x if self.add else y
        return (self.act(y) if self.act is not None else y) * 1.0


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("norm", [False, True], ids=["", "bn"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("act", [None, nn.ReLU, nn.ReLU6], ids=["", "relu", "relu6"])
def test_all_patterns_with_their_names(base, norm, add, act):
    make, norm_type, shape = BASES[base]
    torch.manual_seed(0)
    model = Group(make(), norm_type(4) if norm else None, add, act() if act else None).eval()
    graph = prepare(model, torch.randn(shape)).graph
    name = "[add]" if add else "base"
    wanted = ("BN",) * norm + ("Add",) * add + ((act.__name__,) if act else ())
    assert graph.by_name[name].fused_types == wanted
    assert graph.by_name[name].weight == "base"
    assert [n.name for n in graph.quantized] == ["quant[x]", name, "[mul]"]
    assert not graph.unfused


def reasons(model, example):
    return {(first, second): why for first, second, why in prepare(model, example).graph.unfused}


def test_a_frozen_batch_norm_is_named_with_the_way_out():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.register_buffer("scale", torch.rand(1, channels, 1, 1))
            self.register_buffer("shift", torch.rand(1, channels, 1, 1))

        def forward(self, x):
            return x * self.scale + self.shift

    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.ReLU()).eval()
    why = reasons(model, torch.randn(2, 3, 4, 4))["0", "1"]
    assert why == "FrozenBatchNorm2d is not recognised as a batch norm: use nn.BatchNorm2d in eval mode"


def test_a_batch_norm_without_statistics_and_a_functional_one():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            y = F.batch_norm(self.a(x), self.norm.running_mean, self.norm.running_var)
            return self.b(y)

    found = reasons(revive(Functional()), torch.randn(2, 3, 4, 4))
    assert "owns no module" in found["a", "[batch_norm]"]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.InstanceNorm2d(3)).eval()
    assert not reasons(model, torch.randn(2, 3, 4, 4))  # an instance norm is no batch norm


def test_a_functional_convolution_fuses_and_owns_its_weight():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            return F.relu(F.conv2d(x, self.kernel, padding=1)) * 1.0

    prepared = prepare(Functional().eval(), torch.randn(2, 3, 6, 6))
    node = prepared.graph.by_name["[conv2d]"]
    assert (node.fused_types, node.weight) == (("ReLU",), "kernel")
    assert prepared.weights["kernel"].scale.shape == (4, 1, 1, 1)


def test_an_in_place_operator_on_a_view_reaches_what_it_views():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.conv(x) * 1.0
            y[:, :2].sigmoid_()
            return self.out(y)

    graph = prepare(Half().eval(), torch.randn(2, 3, 4, 4)).graph
    assert graph.by_name["out"].inputs == ("[setitem]",)
    assert set(graph.by_name["[setitem]"].inputs) == {"[mul]", "[sigmoid]"}
