"""Finite masks of a softmax are named where they meet the scores, however they are made, and the ways out work."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow

LOW = -10000.0


class Attention(nn.Module):
    """One attention; `way(self, q, k, hidden)` gives the masked scores, hidden [B, 1, T]."""

    def __init__(self, way):
        super().__init__()
        self.q, self.k, self.v, self.way = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16), way
        self.register_buffer("window", torch.zeros(10, 10))
        self.window[:5, 5:] = -100.0
        self.near = nn.Parameter(torch.randn(10, 10))

    def forward(self, x, keep):
        scores = self.way(self, self.q(x) / 4.0, self.k(x).transpose(1, 2), ~keep[:, None, :])
        return torch.softmax(scores, -1) @ self.v(x)


def inputs():
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[1, 7:] = False
    return 3.0 * torch.randn(2, 10, 16), keep


def checked(way, dtype="qint8"):
    """Relative error of the outputs, and the findings by operator."""
    torch.manual_seed(0)
    model, data = Attention(way).eval(), inputs()
    prepared = qflow.prepare(model, data, qflow.TemplateSetter(dtype))
    qflow.calibrate(prepared, [data])
    with torch.no_grad():
        error = float((prepared(*data) - model(*data)).norm() / model(*data).norm())
    return error, [(f.op, f.message) for f in qflow.check(prepared).findings if f.level != "info"]


def named(findings):
    return [op for op, message in findings if "such a mask takes the range" in message]


WAYS = {
    "computed": ("[add]", lambda self, q, k, hidden: q @ k + (1.0 - (~hidden).float()) * LOW),
    "smallest float": ("[add]", lambda s, q, k, hidden: q @ k + hidden.float() * torch.finfo(torch.float32).min),
    "subtracted": ("[sub]", lambda self, q, k, hidden: q @ k - hidden.float() * 1e4),
    "a factor of the add": ("[add]", lambda self, q, k, hidden: torch.add(q @ k, hidden.float(), alpha=LOW)),
    "an add of the matmul": (
        "[add]",
        lambda self, q, k, hidden: torch.baddbmm((hidden.float() * LOW).expand(-1, 10, -1), q, k),
    ),
    "blended": ("[add]", lambda self, q, k, hidden: q @ k * (~hidden).float() + hidden.float() * LOW),
    "clamped": ("[add]", lambda self, q, k, hidden: (q @ k + hidden.float() * LOW).clamp(min=-2e4)),
    "where": ("[add]", lambda self, q, k, hidden: q @ k + torch.where(hidden, LOW, 0.0)),
    "filled": ("[masked_fill]", lambda self, q, k, hidden: (q @ k).masked_fill(hidden, -1000.0)),
    "a buffer of -100": ("[add](1)", lambda self, q, k, hidden: q @ k + self.near + self.window),
    "two masks": ("[add]", lambda self, q, k, hidden: q @ k + hidden.float() * LOW + 99.0 * self.window),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_finite_mask_is_named_once_where_it_meets_the_scores(way):
    op, scores = WAYS[way]
    error, findings = checked(scores)
    assert named(findings) == [op]
    assert error > 0.09
    assert not [message for _, message in findings if "try qint16" in message and "e+" in message]


def filled(value):
    return lambda self, q, k, hidden: (q @ k).masked_fill(hidden, value)


@pytest.mark.parametrize("value", [-math.inf, -24.0])  # as the finding says; or a constant not far below the scores
def test_the_ways_out_of_a_finite_mask_lower_the_error(value):
    error, findings = checked(filled(value))
    assert not named(findings)
    assert error < 0.1 * checked(filled(LOW))[0]


def test_attention_that_takes_a_float_mask_is_no_exception():
    class Fast(Attention):
        def forward(self, x, keep):
            mask = ((~keep).float() * LOW)[:, None, :].expand(-1, 10, -1)
            return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=mask)

    torch.manual_seed(0)
    data = inputs()
    prepared = qflow.prepare(Fast(None).eval(), data)
    assert named([(f.op, f.message) for f in qflow.calibrate(prepared, [data])]) == ["[add]"]


@pytest.mark.parametrize(
    "scores",
    [
        lambda self, q, k, hidden: q @ k,
        lambda self, q, k, hidden: 1000.0 * (q @ k) + self.near,  # loud scores, but no mask
        lambda self, q, k, hidden: q @ k - 0.5 * torch.arange(300.0)[-10:].flip(0).abs().sub(290.0),  # distances
        filled(-math.inf),
    ],
)
def test_scores_without_a_finite_mask_are_not_called_so(scores):
    assert not named(checked(scores)[1])


def test_int16_holds_a_mask_of_minus_100_beside_the_scores():
    error, findings = checked(lambda self, q, k, hidden: q @ k + self.window, "qint16")
    assert not named(findings)
    assert error < 0.05


class Picks(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, x, keep):
        return self.index(x, keep)


@pytest.mark.parametrize(
    ("index", "noted"),
    [
        (lambda x, keep: x * keep[:, :, None], False),  # an index into a mask
        (lambda x, keep: x.masked_fill(keep[:, 1:2, None], 0.0), False),
        (lambda x, keep: x * 2.0 + x[keep].sum(), True),  # an index by a mask
        (lambda x, keep: x * 2.0 + torch.masked_select(x, keep[:, :, None]).sum(), True),
    ],
)
def test_an_index_by_a_mask_is_told_from_an_index_into_one(index, noted):
    torch.manual_seed(0)
    prepared = qflow.prepare(Picks(index).eval(), inputs())
    assert any("boolean mask" in note for note in prepared.graph.notes) == noted
