"""What goes in: every form of inputs is quantized alike, and what does not fit is refused in a line."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.core.errors import DataError


def image(size=16):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)


class Pair(Conv):
    def forward(self, x, y):
        return torch.sigmoid(self.a(x)) + torch.sigmoid(self.b(y))


def test_positional_keyword_and_mixed_arguments_are_the_same():
    x, y = image(), image() * 3
    prepared = qflow.prepare(Pair().eval(), {"x": x, "y": y})
    qflow.calibrate(prepared, [{"x": x, "y": y}])
    with torch.no_grad():
        assert torch.equal(prepared(x, y), prepared(x=x, y=y))
        assert torch.equal(prepared(x, y=y), prepared(x, y))
        assert torch.equal(prepared(x, x), prepared(x, x.clone()))


@dataclasses.dataclass(frozen=True)
class Batch:
    img: torch.Tensor


class Held(Conv):
    def forward(self, batch):
        return torch.sigmoid(self.a(batch.img))


def test_a_tensor_in_a_dataclass_is_quantized():
    batch = Batch(image())
    prepared = qflow.prepare(Held().eval(), (batch,))
    qflow.calibrate(prepared, [(batch,)])
    with torch.no_grad(), prepared.quantized():
        prepared(batch)
        assert "quant[batch-img]" in prepared.ran
    assert torch.equal(batch.img, image())


class Bytes(Conv):
    def forward(self, img):
        return F.relu(self.a(img.float()))


def test_an_integer_image_is_a_finding():
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    prepared = qflow.prepare(Bytes().eval(), x)
    assert any(f.op == "a" and f.message.startswith("float32 input") for f in qflow.check(prepared).findings)


# ---- items of a data loader


class Gain(Conv):
    def forward(self, x, gain=1.0):
        return self.a(x) * gain


class Sized(Conv):
    def forward(self, x, hw):
        return F.interpolate(self.a(x), size=tuple(hw))


class Nested(Conv):
    def forward(self, feats, target=None):
        y = self.a(feats[0]) + self.a(feats[1])
        return y if target is None else F.mse_loss(y, target)


class Named(Conv):
    def forward(self, batch, flag=True):
        return torch.sigmoid(self.a(batch["img"]))


class Keys(Conv):
    def forward(self, img, target=None):
        return self.a(img) if target is None else self.a(img) - target


X, TARGET = image(), torch.zeros(2)
ITEMS = {
    "a number that is no tensor": (Gain, (X, 10.0), (X, 10.0)),
    "a pair where the default holds": (Gain, X, (X, TARGET)),
    "a size": (Sized, (X, (8, 8)), (X, (8, 8))),
    "a list of features and a target": (Nested, ([X, X],), ([X, X], TARGET)),
    "a dict where forward takes one": (Named, ({"img": X},), {"img": X, "label": TARGET}),
    "a dict with a target": (Keys, {"img": X}, {"img": X, "target": TARGET, "label": TARGET}),
    "inputs and target, the inputs a tuple": (Pair, (X, X), ((X, X), TARGET)),
    "inputs and target, the inputs a dict": (Pair, {"x": X, "y": X}, ({"x": X, "y": X}, TARGET)),
}


@pytest.mark.parametrize("name", ITEMS)
def test_an_item_is_taken_as_the_example_was(name):
    kind, example, item = ITEMS[name]
    prepared = qflow.prepare(kind().eval(), example)
    qflow.calibrate(prepared, [item])
    assert not prepared.unseen
    if kind is Gain and isinstance(example, tuple):
        a, mul = prepared.outputs["a"].scale, prepared.outputs["[mul]"].scale
        assert float(mul / a) == pytest.approx(10.0, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "example", "item", "message"),
    [
        (Sized, (X, (8, 8)), (X, TARGET), r"Data items are inputs of forward\(x, hw\), but got tuple \(missing"),
        (Keys, {"img": X}, {"image": X}, "but got image"),
        (Keys, X, torch.randn(2, 4, 8, 8), "must run on the calibration data, but got: .*expected input"),
    ],
)
def test_an_item_that_does_not_fit_is_refused_in_a_line(kind, example, item, message):
    prepared = qflow.prepare(kind().eval(), example)
    with pytest.raises(DataError, match=message) as caught:
        qflow.calibrate(prepared, [item])
    assert "\n" not in str(caught.value)


def test_calibration_is_in_eval_mode_and_gives_the_mode_back():
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 2, 1)
    prepared = qflow.prepare(nn.Sequential(*layers).eval(), X)
    prepared.train()
    prepared.model[2].eval()
    qflow.calibrate(prepared, [X, X])
    assert int(prepared.model[1].num_batches_tracked) == 0
    assert prepared.training
    assert prepared.model[1].training
    assert not prepared.model[2].training
