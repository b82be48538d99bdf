"""Products of two activations: a computed weight is an input like any other, and only a constant one is a weight."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.core.setter import ModuleNameSetter


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.lin = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.p = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.b = nn.Parameter(torch.randn(4))

    def gate(self, x):  # one value per output channel, computed from the batch
        return torch.sigmoid(self.lin(self.conv(x).mean((0, 2, 3))))


class Correlation(Net):
    def forward(self, z, x):
        z, x = self.lin(z.transpose(1, 3)).transpose(1, 3), self.conv(x)
        b, c, h, w = z.shape
        y = F.conv2d(x.reshape(1, b * c, *x.shape[2:]), z.reshape(b * c, 1, h, w), groups=b * c)
        return torch.relu(y).view(b, c, *y.shape[2:])


class Dynamic(Net):
    def forward(self, x):
        return torch.relu(F.conv2d(self.conv(x), self.p * self.gate(x).view(4, 1, 1, 1), self.b, padding=1))


class Transposed(Net):
    def forward(self, x):
        return torch.relu(F.conv_transpose2d(self.conv(x), self.p * self.gate(x).view(1, 4, 1, 1), padding=1))


class OneD(Net):
    def forward(self, x):
        weight = torch.tanh(self.conv(x)).mean((0, 2)).view(4, 1, -1)[..., :3]
        return torch.relu(F.conv1d(self.lin(x.mean(3).transpose(1, 2)).transpose(1, 2), weight, groups=4))


class Linear(Net):
    def forward(self, x):
        features = self.conv(x).flatten(1)
        return torch.relu(F.linear(weight=torch.tanh(features), input=features * 0.5))


class Sum(Net):
    def forward(self, x):
        features = self.conv(x).flatten(2)
        start = torch.zeros_like(features[:, :, :4]) + self.b
        return torch.relu(torch.baddbmm(start, features, torch.tanh(features).mT, beta=0.5, alpha=0.1))


class Dots(Net):
    def forward(self, x):
        features = self.conv(x).flatten(1)
        return torch.relu(torch.tensordot(features, torch.tanh(features), ([1], [1])))


IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PRODUCTS = {kind: (IMAGE,) for kind in (Dynamic, Transposed, OneD, Linear, Sum, Dots)}
PRODUCTS[Correlation] = (IMAGE[..., :3, :3], IMAGE)


@pytest.mark.parametrize("kind", PRODUCTS, ids=lambda kind: kind.__name__)
def test_one_of_two_int16_factors_falls_back_with_its_reason_and_the_product_is_priced(kind):
    model, example = kind().eval(), PRODUCTS[kind]
    prepared = qflow.prepare(model, example, qconfig_setter=(qflow.TemplateSetter("qint16"),))
    qflow.calibrate(prepared, [example])
    node = next(n for n in prepared.graph.nodes if n.two_activations)
    assert len(node.inputs) == 2  # a constant bias needs no quantizer
    assert node.macs
    reasons = [op.fallback for op in prepared.applied.ops.values() if op.output == qflow.QDtype.qint8]
    assert reasons == [f"{node.name} takes 1 int16 input only"]
    with torch.no_grad():
        got, expected = prepared(*example), model(*example)
    assert float((got - expected).norm() / expected.norm()) < 0.03
    assert not qflow.cost(prepared, example).refusal


def test_a_weight_that_is_computed_from_parameters_alone_is_a_weight():
    class Reparametrized(Net):
        def forward(self, x):
            return torch.relu(F.conv2d(self.conv(x), self.p + F.pad(self.p[..., 1:2, 1:2], (1, 1, 1, 1)), padding=1))

    prepared = qflow.prepare(Reparametrized().eval(), IMAGE)
    node = prepared.graph.by_name["[conv2d]"]
    assert (node.inputs, node.weight, node.fused_types) == (("conv",), "[conv2d]", ("ReLU",))
    assert prepared.weights["[conv2d]"].per_channel


def test_the_computed_bias_of_a_constant_weight_is_an_input():
    class Shifted(Net):
        def forward(self, x):
            return torch.relu(F.conv2d(self.conv(x), self.p, self.gate(x), padding=1))

    prepared = qflow.prepare(Shifted().eval(), IMAGE)
    assert prepared.graph.by_name["[conv2d]"].inputs == ("conv", "[sigmoid]")
    assert not [note for note in prepared.graph.notes if "no output depends on it" in note]


def test_a_table_that_is_embedding_and_weight_has_a_quantizer_for_each_use():
    class Tied(Net):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 4)

        def forward(self, words):
            return torch.tanh(F.linear(self.lin(self.emb(words)), self.emb.weight))

    prepared = qflow.prepare(Tied().eval(), torch.randint(0, 10, (2, 5)))
    assert prepared.graph.by_name["[linear]"].weight == "emb.weight"
    assert "const[emb.weight]" in prepared.outputs


def test_a_product_of_fp16_and_int16_reads_one_int16():
    model = Linear().eval()
    dtypes = {"[tanh]": "float16", "[mul]": "float16"}
    prepared = qflow.prepare(model, IMAGE, qconfig_setter=(ModuleNameSetter(dtypes), qflow.TemplateSetter("qint16")))
    assert sorted(map(str, prepared.applied.ops["[linear]"].input)) == ["qint16", "qint8"]
