"""Operators written as symbols are the named ones; masks and indices that a model makes are told from its inputs."""

import operator

import pytest
import torch
from torch import Tensor, nn

import qflow
from qflow.quant.trace.ops import FUNCTION_KINDS, function_name

SYMBOLS = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "floordiv": "floor_divide",
    "mod": "remainder",
}


@pytest.mark.parametrize("form", ["__{}__", "__i{}__", "__r{}__"], ids=["plain", "in place", "reflected"])
@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_symbol_in_every_form_has_the_name_of_its_function(symbol, form):
    name = function_name(getattr(Tensor, form.format(symbol)))
    assert name == SYMBOLS[symbol] == function_name(getattr(torch, SYMBOLS[symbol]))
    assert name in FUNCTION_KINDS


def test_reflected_functions_whose_order_matters_keep_apart():
    assert function_name(Tensor.__invert__) == "bitwise_not"
    assert function_name(Tensor.__itruediv__) == function_name(Tensor.__truediv__) == "div"
    reflected = [function_name(f) for f in (Tensor.__rsub__, Tensor.__rtruediv__, Tensor.__rpow__)]
    assert reflected == ["rsub", "rdiv", "rpow"]
    assert function_name(torch.greater_equal) == "ge"


class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 3, padding=1), form

    def forward(self, x):
        return self.form(self.conv(x), x[:, :1])


FORMS = {
    "in place": lambda y, x: y.masked_fill(operator.iand(x > 0, x < 1), 0.0),
    "with a number": lambda y, x: y.masked_fill(True ^ (x > 0), 0.0),
    "not": lambda y, x: y.masked_fill(~(x > 0) | torch.less(x, -1), 0.0),
    "floor": lambda y, x: y // 0.5,
    "remainder": lambda y, x: 2.0 % (y.abs() + 1.0),
    "mask as factor": lambda y, x: y * (x > 0)[:, :1],
    "mask as float": lambda y, x: y * (x > 0).float(),
}


def check(form, image):
    torch.manual_seed(0)
    prepared = qflow.prepare(Net(form).eval(), image)
    qflow.calibrate(prepared, [image])
    return prepared, qflow.check(prepared)


@pytest.mark.parametrize("name", FORMS)
def test_a_mask_of_the_models_own_has_a_price_and_nothing_to_check(name):
    prepared, result = check(FORMS[name], torch.randn(2, 3, 8, 8))
    assert [f.message for f in result.findings if f.level == "check"] == []
    assert not qflow.cost(prepared).refusal


def test_integers_of_the_model_are_told_from_integers_that_it_is_given():
    image = torch.randn(2, 3, 8, 8)
    made = {f.level: f.message for f in check(lambda y, x: y * ((x * 3.0).long() << 1).float(), image)[1].findings}
    assert made["info"] == "float32 input: [float] is a mask or an index that the model computes: it has no scale"

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x.float().flip(3))

    given = qflow.check(qflow.prepare(Given().eval(), torch.randint(0, 255, (2, 3, 8, 8)))).findings
    assert "Give the model float inputs" in next(f.message for f in given if f.op == "conv")


def test_only_indexing_by_a_mask_is_indexing_by_a_mask():
    image = torch.randn(2, 3, 8, 8)
    by = qflow.prepare(Net(lambda y, x: y.relu() + y[y > 0].mean()).eval(), image).graph.notes
    assert any("getitem with a boolean mask" in note for note in by)
    of = qflow.prepare(Net(lambda y, x: y * (y > 0)[:, :1]).eval(), image).graph.notes
    assert not of
