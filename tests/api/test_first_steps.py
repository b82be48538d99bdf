"""The first steps in the library: prepare on a batch of the loader, and a call before the calibration."""

import warnings

import pytest
import torch
from torch import nn

import qflow


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)


class Optional(Conv):
    def forward(self, x, mask=None):
        return self.conv(x if mask is None else x * mask)


class Whole(Conv):
    def forward(self, batch):
        return self.conv(batch["x"])


X, TARGET = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
BATCHES = {
    "other keys": (Optional, {"x": X, "label": TARGET, "path": ["a", "b"]}, ["x"]),
    "an optional argument": (Optional, {"mask": X, "x": X, "label": TARGET}, ["x", "mask"]),
    "inputs and targets": (Conv, [X, TARGET], ["x"]),
    "a dict and targets": (Optional, ({"x": X, "label": TARGET}, TARGET), ["x"]),
    "two arguments": (Optional, (X, X), ["x", "mask"]),
    "a whole dict": (Whole, {"x": X, "label": TARGET}, ["batch-x"]),
}


@pytest.mark.parametrize("name", BATCHES)
def test_prepare_takes_the_batch_of_a_loader(name):
    kind, batch, inputs = BATCHES[name]
    prepared = qflow.prepare(kind().eval(), batch)
    assert {n.name for n in prepared.graph.nodes if n.kind == "input"} == {f"quant[{i}]" for i in inputs}
    qflow.calibrate(prepared, [batch])
    assert all(shape[0] == 1 for shape in qflow.cost(prepared).shapes.values())


def test_an_input_without_a_batch_axis_stays_whole():
    class Table(Conv):
        def forward(self, x, table):
            return self.conv(x) * table.mean(0).view(1, -1, 1, 1)

    prepared = qflow.prepare(Table().eval(), (X, torch.rand(5, 4)))
    assert qflow.cost(prepared).shapes == {"quant[x]": (1, 3, 8, 8), "quant[table]": (5, 4)}


def test_an_uncalibrated_model_says_so_once():
    prepared = qflow.prepare(Conv().eval(), X)
    with pytest.warns(UserWarning, match="is not calibrated and computes in float. Call qflow.calibrate first"):
        prepared(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(X)
        chosen = qflow.prepare(Conv().eval(), X)
        qflow.set_fake_quantize(chosen, qflow.FakeQuantState.FLOAT)
        chosen(X)
        calibrated = qflow.prepare(Conv().eval(), X)
        qflow.calibrate(calibrated, [X])
        loaded = qflow.prepare(Conv().eval(), X)
        loaded.load_state_dict(calibrated.state_dict())
        assert torch.equal(loaded(X), calibrated(X))
