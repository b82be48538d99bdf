"""Back through captured values: at every operator the gradient that autograd finds when all of them run forward."""

import pytest
import torch
import torch.nn.functional as F
from support.replays import INF, Made, calibrated
from support.zoo import NAMES, build
from torch import nn

from qflow.quant.replay.backward import Backward
from qflow.quant.replay.capture import capture
from qflow.quant.replay.captured_ops import Ops
from qflow.quant.replay.fused import FoldedOps


class Squashed(nn.Identity):
    def forward(self, x):
        return x.sigmoid()


class Lowered(nn.ReLU):
    def forward(self, x):
        return F.relu(x) - 0.5


def norm():
    made = nn.BatchNorm2d(8)
    nn.init.constant_(made.weight, 3.0)
    nn.init.constant_(made.bias, -6.0)
    return made


def conv(function=lambda m, x: m.c(m.act(m.n(m.a(x)))), act=None, skip=(), **settings):
    a = nn.Conv2d(3, 8, 3, **settings)
    return Made(function, a=a, n=norm(), act=act or nn.ReLU(), c=nn.Conv2d(8, 4, 3)), torch.randn(4, 3, 12, 12), skip


def linear(function, skip=(), **modules):
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(6, 8), "c": nn.Linear(8, 4), "d": nn.Linear(4, 4)}
    return Made(function, **layers, **modules), torch.randn(4, 6), skip


CASES = {
    "an activation in place behind a folded norm": lambda: conv(act=nn.SiLU(inplace=True)),
    "relu in place": lambda: conv(act=nn.ReLU(inplace=True)),
    "relu6": lambda: conv(act=nn.ReLU6()),
    "circular padding": lambda: conv(padding=1, padding_mode="circular"),
    "padding same": lambda: conv(padding="same"),
    "strided, dilated": lambda: conv(stride=2, dilation=2),
    "no batch axis": lambda: conv(lambda m, x: torch.stack([m.c(m.a(sample)) for sample in x])),
    "a sum that a ReLU overwrites": lambda: conv(lambda m, x: m.c(F.relu_(m.n(m.a(x)) + m.a(x)))),
    "a skipped subclass of Identity": lambda: linear(lambda m, x: m.c(m.act(m.a(x))), ["act"], act=Squashed()),
    "a skipped subclass of ReLU": lambda: linear(lambda m, x: m.c(m.act(m.a(x))), ["act"], act=Lowered()),
    "indices that an operator reads": lambda: linear(lambda m, x: m.d(m.c(m.a(x)).gather(1, m.a(x).topk(4)[1] % 4))),
    "a sum of two dtypes": lambda: linear(lambda m, x: m.c((m.a(x).double() + m.b(x)).float())),
    "one value read three times": lambda: linear(lambda m, x: (lambda y: m.c(y + y * y))(F.relu(m.a(x)))),
    "several results": lambda: linear(lambda m, x: (lambda p, q: m.d(p + 2 * q))(*m.a(x).chunk(2, 1))),
    **{name: lambda name=name: (*build(name), ()) for name in NAMES},
}


def reference(model, prepared, captured, directions):
    """Every op run forward for autograd: its value, and the gradient by it."""
    ops, values = Ops(model, prepared, captured), {}
    with torch.enable_grad():
        for op in ops.ops:
            if op.call is None:
                made = (captured.inputs[op.index],)
            else:
                call = (op.call.args, op.call.kwargs)
                made = ops.run(op, *ops.arguments(call, lambda ref: values[ref.op][ref.position]))
            values[op.index] = tuple(t.requires_grad_() if t.is_floating_point() and t.is_leaf else t for t in made)
        found = {i: v[0] for i, v in values.items() if v[0].is_floating_point() and v[0].requires_grad}
        outputs = [values[ref.op][ref.position] for ref, _ in directions]
        gradients = torch.autograd.grad(outputs, list(found.values()), [g for _, g in directions], allow_unused=True)
    return {i: (value, g) for (i, value), g in zip(found.items(), gradients, strict=True) if g is not None and g.any()}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_autograd(case):
    torch.manual_seed(0)
    model, inputs, skip = CASES[case]()
    prepared = calibrated(model.eval(), inputs, skip=skip)
    with torch.no_grad():
        captured = capture(model, prepared.plan, inputs, INF, inner=True)
        ops = FoldedOps(model, prepared, captured)
        backward = Backward(ops, captured, {op.index for op in ops.ops if op.floating})
        directions = [(ref, torch.randn_like(y)) for ref, y in backward.outputs()]
        assert directions
        found = {op.index: (value, both) for op, value, both in backward.walk([directions, directions])}
    wanted = reference(model, prepared, captured, directions)
    raw = set(ops.ends)  # its norm is folded in: another value, another gradient
    assert wanted.keys() - raw <= found.keys()
    for index in wanted.keys() - raw:
        (value, gradient), (kept, both) = wanted[index], found[index]
        assert torch.allclose(kept, value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
        for got in both:
            assert float((got - gradient).norm()) <= 1e-3 * float(gradient.norm()), captured.tape.ops[index].name
