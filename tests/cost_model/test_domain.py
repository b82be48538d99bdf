"""What the measured rows do not cover: prices as ranges, softmax in steps, and reasons to widen or refuse."""

from dataclasses import replace

import pytest
import torch
from support.networks import MODEL, all_at, conv
from torch import nn

from qflow.core.dtype import QDtype
from qflow.core.graph import ModelGraph, OpKind, OpNode
from qflow.cost_model.latency import Pricer, predict
from qflow.cost_model.table import cost_text
from qflow.quant.model.plan import make_plan
from qflow.quant.trace.trace import trace


def beside_a_convolution(*nodes, size=64):
    """A convolution of 16 channels, and the operators `nodes` (kind, function, shape), each reading the one before."""
    found = [OpNode("x", OpKind.input, "QuantStub", (), (1, 16, size, size), "x"), conv("c", "x", 16, 16, size)]
    for i, (kind, function, shape) in enumerate(nodes):
        quantizer = None if kind in (OpKind.move, OpKind.order, OpKind.max_pool) else f"n{i}"
        found.append(OpNode(f"n{i}", kind, function, (found[-1].name,), shape, quantizer))
    return ModelGraph(tuple(found), (("0", found[-1].name),))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OpKind.softmax, "softmax takes"),
        (OpKind.layer_norm, "layer norm may take"),
        (OpKind.grid_sample, "grid_sample may take"),
        (OpKind.order, "topk, sort and gather may take"),
        (OpKind.concat, "transposes, concats, slices and other moves may take"),
        (OpKind.add, "element-wise operators may take"),
        (OpKind.norm, "batch norms and ReLUs outside of a convolution may take"),
    ],
)
def test_operators_without_a_rate_widen_the_interval_and_then_refuse_by_their_time(kind, words):
    """A little changes nothing, most of the time refuses; the reason names the operators."""
    little, most = (
        predict(graph, all_at(graph, QDtype.qint8), MODEL)
        for graph in (beside_a_convolution((kind, kind.value, (1, c, s, s))) for c, s in ((1, 8), (4096, 64)))
    )
    assert (little.refusal, little.widened) == ("", ())
    assert words in most.refusal
    assert "outside what the model was validated on" in most.refusal
    assert most.high_ms / most.latency_ms > little.high_ms / little.latency_ms


def test_between_the_two_the_interval_is_wide_and_says_why():
    graph = beside_a_convolution((OpKind.layer_norm, "layer_norm", (1, 16, 64, 64)))
    report = predict(graph, all_at(graph, QDtype.qint8), MODEL)
    assert report.refusal == ""
    assert report.widened == ("layer norm may take 13% of the time, at prices that no board measured",)
    assert "wide        layer norm may take 13%" in cost_text(report)


def test_a_view_takes_no_time_and_a_move_may():
    for function, moves in (("torch.reshape", False), ("torch.Tensor.contiguous", False), ("torch.permute", True)):
        graph = beside_a_convolution((OpKind.move, function, (1, 4096, 64, 64)))
        op = predict(graph, all_at(graph, QDtype.qint8), MODEL).ops[-1]
        assert (op.ms, op.moved_elements > 0, op.high_ms > 0.0) == (0.0, moves, moves)


def test_a_resize_has_a_price():
    graph = beside_a_convolution((OpKind.resize, "torch.interpolate", (1, 16, 128, 128)))
    op = predict(graph, all_at(graph, QDtype.qint8), MODEL).ops[-1]
    assert op.ms == pytest.approx(16 * 128 * 128e-6 * 0.099 / 1.5)
    assert op.low_ms < op.ms < op.high_ms


class InSteps(nn.Module):
    """Attention whose softmax is `weights`."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def forward(self, x):
        return self.weights(x @ x.transpose(1, 2)) @ x


def shifted(s):
    e = (s - s.amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def reciprocal(s):
    e = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    return e * (1.0 / (e.sum(-1).unsqueeze(-1) + 1e-6))


@pytest.mark.parametrize(
    "weights",
    [
        lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
        lambda s: torch.exp(s - torch.logsumexp(s, -1, keepdim=True)),
        lambda s: (lambda e: e / e.sum(-1, keepdim=True))(torch.exp(s)),
        lambda s: (lambda e: e * torch.reciprocal(e.sum(-1, keepdim=True)))(torch.exp(s)),
        shifted,
        reciprocal,
    ],
)
def test_a_softmax_in_steps_costs_what_a_softmax_costs(weights):
    found = []
    for model in (InSteps(lambda s: s.softmax(-1)).eval(), InSteps(weights).eval()):
        graph = make_plan(trace(model, torch.randn(1, 64, 16)), model).graph
        found.append(predict(graph, all_at(graph, QDtype.qint8), MODEL))
    whole, steps = found
    assert steps.bpu_ms == pytest.approx(whole.bpu_ms)
    assert [sum(op.attention_macs for op in r.ops) for r in found] == [2 * 64 * 64 * 16] * 2
    assert (steps.high_ms, steps.widened) == (pytest.approx(whole.high_ms), whole.widened)


def test_an_exponential_that_is_no_softmax_is_a_look_up():
    model = InSteps(lambda s: s.exp() / (1.0 + s.exp())).eval()
    graph = make_plan(trace(model, torch.randn(1, 64, 16)), model).graph
    report = predict(graph, all_at(graph, QDtype.qint8), MODEL)
    assert sum(op.lut_elements for op in report.ops) == 2 * 64 * 64
    assert not any(op.softmax_elements or op.attention_macs for op in report.ops)


class Clamped(nn.Module):
    """Attention whose scores go through `between` on their way to the softmax."""

    def __init__(self, between):
        super().__init__()
        self.between = between

    def forward(self, x):
        return torch.softmax(self.between(x @ x.transpose(1, 2) / 4.0), dim=-1) @ x


def doubled(x):
    """Twenty diamonds: 2^20 ways through."""
    for _ in range(20):
        x = x * 0.5 + x * 0.25
    return x


@pytest.mark.parametrize("between", [lambda s: s.clamp(-5, 5), lambda s: 5.0 * torch.tanh(s / 5.0), doubled])
def test_attention_is_seen_through_what_scales_and_bounds_its_scores(between):
    model = Clamped(between).eval()
    graph = make_plan(trace(model, torch.randn(1, 4, 16)), model).graph
    matmuls = [w for w in Pricer(graph, MODEL).works if w.kind == OpKind.matmul]
    assert [w.attention_macs for w in matmuls] == [4 * 4 * 16] * 2


def test_a_network_of_depthwise_convolutions_has_the_wide_interval():
    stub = OpNode("x", OpKind.input, "QuantStub", (), (1, 32, 8, 8), "x")
    few = (stub, conv("d", "x", 32, 32, 8, groups=32), conv("p", "d", 32, 32, 8))
    for nodes, ends in ((few, MODEL.short_interval), (few[:2], (0.65, 1.5))):
        graph = ModelGraph(nodes, (("0", nodes[-1].name),))
        report = predict(graph, all_at(graph, QDtype.qint8), MODEL)
        assert (report.ops[1].low_ms, report.ops[1].high_ms) == pytest.approx([end * report.ops[1].ms for end in ends])
        assert report.widened == (
            () if nodes is few else ("100% of the MACs are depthwise, and the measured rows give them no price",)
        )


def test_outputs_that_may_be_converted_to_float_are_told_with_what_that_would_add():
    graph = beside_a_convolution((OpKind.resize, "interpolate", (1, 16, 512, 512)))
    int8 = all_at(graph, QDtype.qint8)
    report, converted = (predict(graph, int8, replace(MODEL, host_dequantize=on)) for on in (False, True))
    assert converted.latency_ms - report.latency_ms == pytest.approx(report.float_output_ms) != 0.0
    assert f"the host adds up to {report.float_output_ms:.3f} ms (device.cost.host_dequantize=true)" in cost_text(
        report
    )
    assert "counted as integers" not in cost_text(converted)
