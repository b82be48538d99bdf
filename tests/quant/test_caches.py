"""Tables that a module computes once: traced with them filled or not, and after train() or eval() has emptied them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.core.errors import ModelError


class Kept(nn.Module):
    """A table from parameters that is computed on first use and kept."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.p = nn.Linear(8, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(8))
        self.cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = (torch.softmax(self.p * 2.0, 0) + self.p).detach()
        return self.b(self.a(x) * self.cache)


class Emptied(Kept):
    def train(self, mode=True):
        self.cache = None
        return super().train(mode)


class EmptiedBuffer(Kept):
    def __init__(self):
        super().__init__()
        del self.cache
        self.register_buffer("cache", None, persistent=False)

    def train(self, mode=True):
        self.cache = None
        return super().train(mode)


class Weight(Emptied):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        if self.cache is None:
            self.cache = self.w * torch.tanh(self.w) + self.w
        return self.b(F.linear(self.a(x), self.cache).relu())


class Rotary(Kept):
    """A buffer that grows to the longest length seen."""

    def forward(self, x):
        if self.cache is None or len(self.cos) < x.shape[1]:
            self.cache = True
            self.register_buffer("cos", (torch.arange(x.shape[1]).float()[:, None] * self.p).cos(), persistent=False)
        return self.b(self.a(x) * self.cos[: x.shape[1]])


@pytest.mark.parametrize("kind", [Kept, Emptied, EmptiedBuffer, Weight, Rotary])
@pytest.mark.parametrize("warm", [False, True], ids=["empty", "filled"])
def test_a_table_is_no_state_and_may_be_filled_at_any_time(kind, warm):
    model, x = kind().eval(), torch.randn(4, 5, 8)
    with torch.no_grad():
        expected = (kind().eval() if not warm else model)(x)
    prepared = qflow.prepare(model, x)
    qflow.calibrate(prepared, [x, x[:3]])
    with torch.no_grad():
        before = prepared(x)
    assert float((before - expected).norm() / expected.norm()) < 0.05
    prepared.train()
    prepared(x).sum().backward()
    prepared.eval()
    with torch.no_grad():
        assert torch.equal(prepared(x), before)
    assert [f.message for f in qflow.check(prepared).findings if f.level == "check"] == []
    assert not qflow.cost(prepared).refusal


def test_a_value_that_is_kept_from_one_batch_to_the_next_is_still_refused():
    class Remembers(Kept):
        def forward(self, x):
            if self.cache is None:
                self.cache = self.a(x).mean()
            return self.b(self.a(x) + self.cache)

    with pytest.raises(ModelError, match="same operators at every call"):
        qflow.prepare(Remembers().eval(), torch.randn(4, 5, 8))


def test_a_compiled_model_is_refused_in_a_line_with_a_way_out_that_works():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    whole = torch.compile(model)
    with pytest.raises(ModelError, match=r"got torch.compile at the model. Give model._orig_mod in its place"):
        qflow.prepare(whole, x)
    assert qflow.prepare(whole._orig_mod, x).graph.outputs == (("0", "0"),)
    part = nn.Sequential(whole, nn.Conv2d(4, 2, 1)).eval()
    with pytest.raises(ModelError, match=r"got torch.compile at 0. Give 0._orig_mod"):
        qflow.prepare(part, x)
    part[1].compile()
    part[0] = whole._orig_mod
    with pytest.raises(ModelError, match=r"got torch.compile at 1. Give the model before its compile\(\)"):
        qflow.prepare(part, x)
