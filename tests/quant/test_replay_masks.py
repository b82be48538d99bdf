"""Python values in a forward: those that no quantizer can change are replayed, the others are not."""

import pytest
import torch
from support.replays import INF, calibrated, full
from torch import nn

from qflow.analysis.measures.distances import disagreement
from qflow.analysis.sensitivity.candidates import candidates
from qflow.quant.replay.capture import ReplayError, capture
from qflow.quant.replay.replay import Replay
from qflow.quant.trace.calling import call_model, named_tensors

ROWS, WIDTH = 3, 6


class Masked(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        return self.function(self, x, mask)


def masked_model(function):
    torch.manual_seed(0)
    mask = torch.ones(4, ROWS, dtype=torch.long)
    mask[:, 2] = 0
    model, inputs = Masked(function).eval(), (torch.randn(4, ROWS, WIDTH), mask)
    return model, inputs, calibrated(model, inputs)


def all_of_a_mask(m, x, mask):
    y = m.a(x)
    if not mask.bool().all():
        y = y.masked_fill(mask[..., None] == 0, 0.0)
    return m.b(y)


OF_MASKS = {
    "all": all_of_a_mask,
    "any": lambda m, x, mask: m.b(m.a(x) * mask[..., None] if (mask == 0).any() else m.a(x)),
    "int": lambda m, x, mask: m.b(m.a(x)[:, : int(mask.sum(1).max())]),
    "tolist": lambda m, x, mask: m.b(m.a(x))[:, mask.sum(1).tolist()[0]],
    "float": lambda m, x, mask: m.b(m.a(x) * float(mask.float().mean())),
    "equal": lambda m, x, mask: m.b(m.a(x) if torch.equal(mask, mask.clone()) else x),
    "index": lambda m, x, mask: m.b(m.a(x)[:, : mask[0].sum()]),
    "argmax": lambda m, x, mask: m.b(m.a(x))[..., int(m.a(x)[0, 0].argmax()) :],
}


@pytest.mark.parametrize("what", OF_MASKS)
@torch.no_grad()
def test_a_python_value_that_no_quantizer_changes_is_the_same_in_every_replay(what):
    """From integer inputs, or from indices, which follow the float order."""
    model, inputs, prepared = masked_model(OF_MASKS[what])
    variants = [row.variant for row in candidates(prepared)]
    plain, wanted = dict(named_tensors(call_model(model, inputs))), full(prepared, inputs, variants)
    replay = Replay(model, prepared, capture(model, prepared.plan, inputs, INF))
    for i, got in replay.run(variants):
        assert disagreement(got, wanted[i], plain, 1e-2) < 1e-3, variants[i].name


OF_VALUES = {
    "bool": lambda m, x, mask: m.b(m.a(x) if m.a(x).mean() < 9 else x),
    "int": lambda m, x, mask: m.b(m.a(x) * int((m.a(x) > 0).sum()) / 50),
    "float": lambda m, x, mask: m.b(m.a(x) / float(m.a(x).abs().max())),
    "tolist": lambda m, x, mask: m.b(m.a(x)[:, (m.a(x)[0, :, 0] > 0).nonzero()[:, 0].tolist()]),
    "slice": lambda m, x, mask: m.b(m.a(x)[:, : (m.a(x)[0, :, 0] > -9).sum()]),
    "equal": lambda m, x, mask: m.b(x if torch.equal(m.a(x), x) else m.a(x)),
    "allclose": lambda m, x, mask: m.b(x if torch.allclose(m.a(x), x) else m.a(x)),
}


@pytest.mark.parametrize("what", OF_VALUES)
@torch.no_grad()
def test_a_python_value_that_quantizers_change_is_no_replay(what):
    model, inputs, prepared = masked_model(OF_VALUES[what])
    with pytest.raises(ReplayError, match="a Python value is taken from"):
        capture(model, prepared.plan, inputs, INF)


@torch.no_grad()
def test_an_operator_that_the_example_did_not_reach_is_replayed_in_float():
    """The model was prepared without padding."""
    torch.manual_seed(0)
    model, x, mask = Masked(all_of_a_mask).eval(), torch.randn(4, ROWS, WIDTH), torch.ones(4, ROWS, dtype=torch.long)
    prepared = calibrated(model, (x, mask))
    padded = mask.clone()
    padded[:, 2] = 0
    variants = [row.variant for row in candidates(prepared)]
    plain, wanted = dict(named_tensors(call_model(model, (x, padded)))), full(prepared, (x, padded), variants)
    captured = capture(model, prepared.plan, (x, padded), INF)
    assert any("masked_fill" in op.name for op in captured.tape.ops)
    for i, got in Replay(model, prepared, captured).run(variants):
        assert disagreement(got, wanted[i], plain, 1e-2) < 1e-3, variants[i].name
