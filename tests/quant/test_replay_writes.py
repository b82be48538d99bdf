"""Writes into views, and modules that give their argument back: replayed as the model runs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import WritesByStrides
from support.replays import INF, Made, calibrated, full
from torch import nn

from qflow.analysis.measures.distances import disagreement
from qflow.analysis.sensitivity.candidates import candidates
from qflow.quant.replay.capture import ReplayError, capture
from qflow.quant.replay.replay import Replay
from qflow.quant.replay.widen import widen
from qflow.quant.trace.calling import call_model, named_tensors

ROWS, WIDTH = 3, 6


def identities(m, x):
    q, k = m.a(x).chunk(2, -1)
    return m.b(torch.cat([m.same(q) * m.also(k), F.dropout(k, 0.5, training=False)], -1))


def flatten_of_flat(m, x):
    return m.b(torch.sigmoid(m.flat(m.a(x)[:, 0])))


def box_refinement(m, x):
    tmp = m.a(x)
    tmp[..., :2] += m.b(x)[..., :2]
    tmp[..., 2:4] = tmp[..., 2:4] + x[..., 2:4]
    return m.c(x), tmp.sigmoid()


def residual(m, x):
    y = torch.tanh(m.a(x))
    y += m.b(y)
    return m.c(y) + y


def filled_row_by_row(m, x):
    y = torch.tanh(m.a(x))
    out = torch.zeros_like(y)
    for i in range(ROWS):
        out[:, i] = m.b(y[:, i])
    return m.c(out)


def each_row_from_the_last(m, x):
    y = torch.tanh(m.a(x))
    for i in range(1, ROWS):
        y[:, i] += m.b(y[:, i - 1])
    return m.c(y)


def view_of_a_constant(m, x):
    out = x.new_zeros(x.shape)
    first, row = out[:, :2], out[:, 0]
    first.copy_(m.a(x)[:, :2])
    return m.b(out + x) + row[:, None]


def scattered(m, x):
    y = torch.tanh(m.a(x))
    y.index_put_((torch.tensor([0]), torch.tensor([1])), y.new_full((WIDTH,), 0.5))
    y.scatter_(1, torch.zeros(len(x), 1, WIDTH, dtype=torch.long), m.b(x)[:, :1])
    y[:, 1:].masked_fill_(torch.eye(2, WIDTH).bool()[None], 0.0)
    return m.c(y)


def view_read_after_its_base_was_written(m, x):
    y = torch.tanh(m.a(x))
    view = y[:, :2]
    y.mul_(2.0)
    return m.b(y)[:, :2] + view


def base_read_after_all_of_it_was_written(m, x):
    y = m.a(x)
    y.view(len(x), -1).relu_()
    return m.b(y)


def parts_that_do_not_overlap(m, x):
    y = m.a(x)
    left, right = y.split(3, -1)
    left.mul_(0.5)
    right.add_(1.0)
    return m.b(y) * torch.cat([right, left], -1)


def modules_that_write(m, x):
    y = m.a(x)
    m.relu(y.transpose(1, 2)[..., :2])
    m.flat(y).mul_(0.5)
    return m.b(y)


def detached(m, x):
    y = m.a(x)
    y.detach()[..., 0].mul_(3.0)
    return m.b(y)


def expanded(m, x):
    y = m.a(x)[:, :1]
    wide = y.expand(-1, ROWS, -1)
    y.mul_(0.5)
    return m.b(wide)


def input_itself(m, x):
    x[:, 0] *= 2.0
    return m.b(torch.tanh(m.a(x)))


def given_an_output(m, x):
    y = m.a(x)
    return m.b(torch.mul(y, y, out=torch.empty_like(y)))


def feature_map(m, x):
    y = m.conv(x[:, None])
    y[:, :2].mul_(0.5)
    y.flatten(2)[..., 3:] += 1.0
    return m.mix(y)


MODELS = [
    *(identities, flatten_of_flat, box_refinement, residual, filled_row_by_row, each_row_from_the_last),
    *(view_of_a_constant, scattered, view_read_after_its_base_was_written, base_read_after_all_of_it_was_written),
    *(parts_that_do_not_overlap, modules_that_write, detached, expanded, input_itself, given_an_output, feature_map),
]


def made(function):
    torch.manual_seed(0)
    linear = {name: nn.Linear(WIDTH, WIDTH) for name in "abc"}
    others = {"same": nn.Identity(), "also": nn.Dropout(0.5), "flat": nn.Flatten(), "relu": nn.ReLU(inplace=True)}
    maps = {"conv": nn.Conv2d(1, 4, 3, padding=1), "mix": nn.Conv2d(4, 2, 1)}
    return Made(function, **linear, **others, **maps).eval()


def compared(model, x):
    """(largest difference of the float outputs, of the outputs of any variant) between replays and full forwards."""
    prepared = calibrated(model, x)
    variants = [row.variant for row in candidates(prepared)]
    plain, wanted = dict(named_tensors(call_model(model, x))), full(prepared, x, variants)
    rounding, worst = 0.0, 0.0
    for memory in (INF, 10.0):
        replay = Replay(model, prepared, capture(model, prepared.plan, x, memory))
        rounding = max(rounding, disagreement(replay.replayed(), plain, plain, 1.0))
        worst = max(worst, *(disagreement(got, wanted[i], plain, 1e-2) for i, got in replay.run(variants)))
    return rounding, worst


@pytest.mark.parametrize("function", MODELS, ids=lambda f: f.__name__)
@torch.no_grad()
def test_what_a_write_changes_is_replayed(function):
    rounding, worst = compared(made(function), torch.randn(4, ROWS, WIDTH))
    assert rounding < 1e-6
    assert worst < 1e-3


@pytest.mark.parametrize("function", [f for f in MODELS if f is not scattered], ids=lambda f: f.__name__)
@torch.no_grad()
def test_several_variants_of_it_run_at_once(function):
    model, x = made(function), torch.randn(4, ROWS, WIDTH)
    prepared = calibrated(model, x)
    variants = [row.variant for row in candidates(prepared)]
    captured = capture(model, prepared.plan, x, INF)
    plain, wanted = dict(named_tensors(call_model(model, x))), full(prepared, x, variants)
    widths = widen(model, prepared, Replay(model, prepared, captured).ops, x, captured, 4, 5)
    for i, got in Replay(model, prepared, captured, widths).run(variants):
        assert disagreement(got, wanted[i], plain, 1e-2) < 1e-3, variants[i].name


VIEWS = {
    "rows": lambda y: y[:, 1:],
    "row": lambda y: y[:, 0],
    "half": lambda y: y.chunk(2, -1)[1],
    "turned": lambda y: y.transpose(1, -1),
    "flat": lambda y: y.flatten(1),
    "unsqueezed": lambda y: y.unsqueeze(1),
}
WRITES = {
    "mul": lambda y: y.mul_(0.5),
    "relu": lambda y: y.relu_(),
    "set": lambda y: y.__setitem__((..., 0), 0.25),
    "add": lambda y: y.add_(y.new_ones(())),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([*VIEWS, *WRITES])), min_size=2, max_size=7))
@torch.no_grad()
def test_any_views_and_writes_are_replayed(steps):
    """A law: whatever is viewed and written in whatever order, replays equal full forwards."""

    def program(m, x):
        held = [torch.tanh(m.a(x))]
        for which, step in steps:
            y = held[which % len(held)]
            if step in WRITES:
                WRITES[step](y)
            elif y.ndim > 1 and y.shape[1] > 1 and y.shape[-1] > 1:
                held.append(VIEWS[step](y))
        return m.b(held[0]), torch.cat([y.flatten() for y in held])

    rounding, worst = compared(made(program), torch.randn(2, ROWS, WIDTH))
    assert rounding < 1e-6
    assert worst < 1e-3


@torch.no_grad()
def test_a_write_to_a_place_in_memory_is_no_replay():
    """Pitfall P21: the values of the tensor change with its view."""
    torch.manual_seed(0)
    model, x = WritesByStrides().eval(), torch.randn(2, 3, 6, 6)
    prepared = calibrated(model, x)
    with pytest.raises(ReplayError, match="memory that other tensors share"):
        capture(model, prepared.plan, x, INF)
