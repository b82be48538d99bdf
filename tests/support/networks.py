"""Networks and a cost model to price them with."""

from support.models import zoo

from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.core.resolve import resolve
from qflow.core.setter import TemplateSetter
from qflow.cost_model.model import CostModel
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace

GRAPHS = {name: make_plan(trace(*pair), pair[0]).graph for name, pair in zoo().items()}


MODEL = CostModel()


def conv(name, source, cin, cout, size, kernel=9, groups=1):
    attrs = {"in": cin, "out": cout, "groups": groups, "kernel": kernel, "weights": cout * (cin // groups) * kernel}
    return OpNode(name, OpKind.conv, "Conv2d", (source,), (1, cout, size, size), name, name, attrs=attrs)


def network():
    stub = OpNode("x", OpKind.input, "QuantStub", (), (1, 3, 64, 64), "x")
    act = OpNode("act", OpKind.lut, "SiLU", ("a",), (1, 32, 32, 32), "act")
    return ModelGraph((stub, conv("a", "x", 3, 32, 32), act, conv("b", "act", 32, 20, 32)), (("0", "b"),))


def all_at(graph, dtype):
    return resolve(graph, [TemplateSetter(dtype)], "nash-m")
