"""What training tests share: a small calibrated model, data with something to learn, a loss, an optimizer."""

import torch
import torch.nn.functional as F
from support.models import ResNet, revive

from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare


def calibrated(model, example, dtype=QDtype.qint8):
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, 2)]), qconfig, CalibrationSettings(method="minmax"))
    return prepared, qconfig


def small(dtype=QDtype.qint8):
    torch.manual_seed(0)
    return calibrated(revive(ResNet()), torch.randn(4, 3, 16, 16), dtype)[0]


def data(count=4, size=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(size, 3, 16, 16, generator=generator)
        y = (x.mean((1, 2, 3)) * 40).long().clamp(0, 4)
        yield x, (x, y)


def loss(outputs, batch):
    return F.cross_entropy(outputs, batch[1])


def sgd(prepared, rate=0.02):
    return torch.optim.SGD(prepared.parameters(), rate, momentum=0.9)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())
