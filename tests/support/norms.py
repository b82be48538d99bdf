"""Small models with norms, calibrated as a user does it, and tokens whose sizes differ by orders of magnitude."""

import torch
import torch.nn.functional as F
from torch import nn

import qflow

INT8, INT16 = qflow.TemplateSetter("qint8"), qflow.TemplateSetter("qint16")


def calibrated(model, x, setter=INT8):
    prepared = qflow.prepare(model, x, qconfig_setter=setter)
    qflow.calibrate(prepared, [x])
    return prepared


def inner_of(prepared):
    return [name for node in prepared.graph.quantized for name in node.inner]


class Norms(nn.Module):
    def __init__(self, written_out=False):
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(16, 64), nn.LayerNorm(64), nn.Linear(64, 4)
        self.written_out = written_out

    def forward(self, x):
        y = self.first(x)
        if not self.written_out:
            return self.head(self.norm(y))
        d = y - y.mean(-1, keepdim=True)
        y = d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5)
        return self.head(y * self.norm.weight + self.norm.bias)


def norms(written_out=False):
    torch.manual_seed(1)
    return Norms(written_out).eval()


def unlike_tokens(count=256):
    torch.manual_seed(0)
    return torch.randn(count, 16) * torch.exp(torch.randn(count, 1) * 2)


def error(prepared, model, x):
    with torch.no_grad():
        return float((prepared(x) - model(x)).norm() / model(x).norm())


class Tokens(nn.Module):
    """Norms as modules, shared and as a function, attention, and a log-softmax."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.rms = nn.Linear(8, 16), nn.LayerNorm(16), nn.RMSNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        y = self.norm(self.first(x))
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.rms(self.norm(y)) + F.layer_norm(y, (16,))
        return F.log_softmax(self.head(y), -1)
