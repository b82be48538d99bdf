"""Masks of a softmax: masked positions weigh nothing in any precision, however the mask is written."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.core.dtype import QDtype
from qflow.quant.model.calibrate import collect
from qflow.quant.trace.decompose import attention
from qflow.quant.values.fake_quant import FakeQuant

INF = -math.inf


class Attention(nn.Module):
    """One causal attention whose mask is applied by `way(scores inputs)`."""

    def __init__(self, way):
        super().__init__()
        self.qkv, self.out, self.way = nn.Linear(16, 48), nn.Linear(16, 16), way
        self.heads = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.out(self.way(self, *self.qkv(x).chunk(3, -1), hidden))


def written(mask):
    def way(self, q, k, v, hidden):
        return torch.softmax(mask(q @ k.transpose(-2, -1) / 4.0, hidden), -1) @ v

    return way


def additive(hidden):
    slope = -torch.arange(len(hidden)).float() / len(hidden)
    return slope.expand(len(hidden), -1).masked_fill(hidden, INF)


WAYS = {
    "is_causal": lambda self, q, k, v, hidden: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "boolean": lambda self, q, k, v, hidden: F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden),
    "float": lambda self, q, k, v, hidden: F.scaled_dot_product_attention(q, k, v, attn_mask=additive(hidden)),
    "heads": lambda self, q, k, v, hidden: self.heads(q, k, v, attn_mask=hidden)[0],
    "heads, no weights": lambda self, q, k, v, hidden: self.heads(q, k, v, attn_mask=hidden, need_weights=False)[0],
    "masked_fill": written(lambda scores, hidden: scores.masked_fill(hidden, INF)),
    "masked_fill_": written(lambda scores, hidden: scores.masked_fill_(hidden, INF)),
    "before a factor": written(lambda scores, hidden: scores.masked_fill(hidden, INF) * 0.7),
    "where": written(lambda scores, hidden: torch.where(hidden, INF, scores)),
    "where of a tensor": written(lambda scores, hidden: torch.where(hidden, torch.tensor(INF), scores)),
    "add": written(lambda scores, hidden: scores + additive(hidden)),
}


def causal_pair():
    """Two batches that differ in the last two positions only."""
    torch.manual_seed(0)
    early = torch.randn(3, 6, 16)
    late = early.clone()
    late[:, 4:] += 3 * torch.randn(3, 2, 16)
    return early, late


@pytest.mark.parametrize("dtype", ["qint8", "qint16"])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_leaks_from_what_is_masked(way, dtype):
    early, late = causal_pair()
    model = Attention(WAYS[way]).eval()
    prepared = qflow.prepare(model, early, qflow.TemplateSetter(dtype))
    findings = qflow.calibrate(prepared, [early, late])
    with torch.no_grad():
        assert torch.equal(prepared(early)[:, :4], prepared(late)[:, :4])
        difference = (prepared(early) - model(early)).norm() / model(early).norm()
    assert float(difference) < 0.1
    assert not [f for f in findings if "infinite" in f.message or "always zero" in f.message]


def test_a_mask_is_no_quantization_point():
    early, _ = causal_pair()
    prepared = qflow.prepare(Attention(WAYS["is_causal"]).eval(), early)
    node = prepared.graph.by_name["[masked_fill]"]
    assert (node.kind, node.quantizer) == ("move", None)
    assert prepared.graph.sources("[softmax]") == ("[matmul]",)
    assert not prepared.plan.masks
    added = qflow.prepare(Attention(WAYS["add"]).eval(), early)
    assert added.plan.masks == {"[add]", "const[[add]]"}


def test_a_large_finite_mask_is_named_and_infinity_elsewhere_too():
    early, _ = causal_pair()
    prepared = qflow.prepare(Attention(written(lambda s, hidden: s.masked_fill(hidden, -1e9))).eval(), early)
    found = {f.op: f.message for f in qflow.calibrate(prepared, [early])}
    assert "takes the range from the scores" in found["[masked_fill]"]
    assert "float('-inf')" in found["[masked_fill]"]

    class Largest(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0, INF).amax(-1)

    prepared = qflow.prepare(Largest().eval(), early)
    found = {f.op: f.message for f in qflow.calibrate(prepared, [early])}
    assert "infinite values saturate" in found["[masked_fill]"]


@pytest.mark.parametrize("boolean", [True, False])
def test_a_row_that_is_masked_as_a_whole_is_what_torch_makes_of_it(boolean):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind(0)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    seen[2] = False
    mask = seen if boolean else torch.zeros(5, 5, dtype=torch.float64).masked_fill(~seen, INF)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(attention(q, k, v, attn_mask=mask), expected, atol=1e-12)
    assert not bool(expected[:, 2].any())


def test_padding_comes_with_the_batch():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x, hidden):
            return self.heads(x, x, x, key_padding_mask=hidden)[0]

    early, late = causal_pair()
    none, some = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.bool)
    some[:, 4:] = True
    prepared = qflow.prepare(Padded().eval(), (early, none), qflow.TemplateSetter("qint16"))
    qflow.calibrate(prepared, [(early, some), (late, none)])
    with torch.no_grad():
        assert torch.equal(prepared(early, some)[:, :4], prepared(late, some)[:, :4])
        assert not torch.equal(prepared(early, none)[:, :4], prepared(late, none)[:, :4])


@pytest.mark.parametrize("dtype", [QDtype.qint8, QDtype.float16])
def test_a_quantizer_of_a_mask_keeps_infinity_and_moves_with_the_rest(dtype):
    quantizer = FakeQuant("scores")
    quantizer.dtype, quantizer.keeps_mask, quantizer.clip, quantizer.enabled = dtype, True, True, True
    quantizer.set_scale(0.1)
    x = torch.tensor([INF, -3.0, 2.0])
    assert quantizer(x).tolist() == pytest.approx([INF, -3.0, 2.0])
    written = x.clone()
    quantizer.write(written)
    assert torch.equal(written, quantizer(x))
    if dtype == QDtype.qint8:
        quantizer.averaging_constant = 1.0
        quantizer.train()(x)
        assert float(quantizer.scale) == pytest.approx(3.0 / 128)


@pytest.mark.slow
def test_a_masked_model_compiles():
    early, late = causal_pair()
    prepared = qflow.prepare(Attention(WAYS["float"]).eval(), early)
    qflow.calibrate(prepared, [early, late])
    with torch.no_grad():
        expected = prepared(early)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(prepared, backend="eager", fullgraph=True)(early), expected)


def test_a_masked_model_trains():
    early, late = causal_pair()
    prepared = qflow.prepare(Attention(WAYS["float"]).eval(), early)
    qflow.calibrate(prepared, [early, late])
    prepared(early)[:, :4].square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in prepared.parameters() if p.grad is not None)
    assert collect(prepared, [(early, 3)]).histograms["[add]"].infinite
