"""How a replay saves time: packed convolutions, and more variants at once where values are small."""

import pytest
import torch
from support.replays import INF, calibrated
from torch import nn

from qflow.analysis.sensitivity.candidates import candidates
from qflow.quant.model.prepare import prepare
from qflow.quant.replay.capture import capture
from qflow.quant.replay.packed import packed
from qflow.quant.replay.replay import Replay
from qflow.quant.replay.widen import widen

CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "strided, dilated": nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2),
    "depthwise, no bias": nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
    "1 x 1": nn.Conv2d(6, 8, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@torch.no_grad()
def test_a_packed_convolution_gives_the_same_at_any_batch_size(name):
    torch.manual_seed(0)
    conv, x = CONVOLUTIONS[name], torch.randn(2, 6, 9, 9)
    leaf = prepare(nn.Sequential(conv).eval(), x).model[0]
    convolve = packed(leaf, conv.weight, conv.bias, x)
    assert convolve is not None
    for n in (1, 2, 5):
        many = torch.randn(n, 6, 9, 9)
        torch.testing.assert_close(convolve(many), conv(many), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_onednn_has_not_is_not_packed():
    x = torch.randn(2, 6, 9, 9)
    for conv in (nn.Conv2d(6, 8, 3, padding="same"), nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular")):
        leaf = prepare(nn.Sequential(conv).eval(), x).model[0]
        assert packed(leaf, conv.weight, conv.bias, x) is None
    leaf = prepare(nn.Sequential(nn.Conv2d(6, 8, 3)).eval(), x).model[0]
    assert packed(leaf, leaf.weight.double(), None, x.double()) is None


@torch.no_grad()
def test_more_variants_run_at_once_where_values_are_smaller():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 32, 32)
    prepared = calibrated(model, x)
    captured = capture(model, prepared.plan, x, INF)
    replay = Replay(model, prepared, captured)
    replay.widths = widen(model, prepared, replay.ops, x, captured, 2, 16, room=6e4)
    variants = [row.variant for row in candidates(prepared)]
    sizes = [len(group) for group in replay.passes(variants)]
    assert sizes[0] < sizes[-1] or sizes[0] < sizes[1]
    alone = dict(Replay(model, prepared, captured).run(variants))
    for i, got in replay.run(variants):
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, alone[i][name], rtol=1e-3, atol=1e-4)
