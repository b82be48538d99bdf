"""Modules with fake quantizers: a float module of another class, which quantizes its inputs and its output."""

import torch.nn.functional as F
from torch import nn

from horizon_plugin_pytorch import MissingFact
from horizon_plugin_pytorch.nn.quantized import FloatFunctional
from horizon_plugin_pytorch.quantization.stubs import DeQuantStub, QuantStub

GEMMS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# These pass values on: no qconfig of their own acts on them.
PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Unflatten, DeQuantStub)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
KNOWN = (
    *GEMMS, *PASSING, *POOLS, QuantStub, FloatFunctional, nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.SiLU,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.UpsamplingBilinear2d, nn.UpsamplingNearest2d, nn.BatchNorm2d,
)  # fmt: skip


class _Ports:
    """Fake quantizers of a module by port."""

    def take(self, qconfig):
        self.activation_post_process = qconfig.activation() if qconfig.activation else None
        factories = qconfig.input if isinstance(qconfig.input, list) else [qconfig.input]
        self.input_fake_quants = nn.ModuleList(f() if f else nn.Identity() for f in factories)

    def quantized_input(self, position, x):
        own = self.input_fake_quants
        return own[position](x) if position < len(own) else x

    def finish(self, y):
        return y if self.activation_post_process is None else self.activation_post_process(y)


class _Gemm(_Ports):
    def take(self, qconfig):
        super().take(qconfig)
        self.weight_fake_quant = qconfig.weight() if qconfig.weight else None

    def compute(self, x, other=None):
        weight = self.weight if self.weight_fake_quant is None else self.weight_fake_quant(self.weight)
        y = F.linear(x, weight, self.bias) if isinstance(self, nn.Linear) else self._conv_forward(x, weight, self.bias)
        y = y if other is None else y + other
        return self.finish(y if self.fused_relu is None else self.fused_relu(y))

    def forward(self, x):
        return self.compute(self.quantized_input(0, x))

    def add(self, a, b):
        a, b = self.quantized_input(0, a), self.quantized_input(1, b)
        return self.compute(b, a) if self.fused_add else self.compute(a, b)


class _Functional(_Ports):
    def forward(self, method, *args, **kwargs):
        tensors = args[0] if method == "cat" else args
        tensors = [self.quantized_input(i, x) for i, x in enumerate(tensors)]
        args = [tensors, *args[1:]] if method == "cat" else tensors
        return self.finish(super().forward(method, *args, **kwargs))


class _Other(_Ports):
    def forward(self, x):
        return self.finish(super().forward(self.quantized_input(0, x)))


def fused_class(module):
    """`Conv2d` with what was fused into it: ConvAddReLU2d, LinearReLU."""
    base = type(module).__name__
    stem, dims = (base, "") if base == "Linear" else (base[:-2], base[-2:])
    relu = type(module.fused_relu).__name__ if module.fused_relu else ""
    tail = ("Add" if module.fused_add is not None else "") + relu
    return f"{stem}{tail}{dims}"


def convert(module):
    """Make the QAT module of a float module, in place; its `qconfig` says how it is quantized."""
    source = type(module)
    if isinstance(module, (*PASSING, *POOLS)):
        return
    if not isinstance(module, KNOWN):
        raise MissingFact(f"the values inside {source.__name__}")
    if isinstance(module, GEMMS):
        name, mixin = fused_class(module), _Gemm
    else:
        name, mixin = source.__name__, _Functional if isinstance(module, FloatFunctional) else _Other
    module.__class__ = type(name, (mixin, source), {"qat_source": source})
    module.take(module.qconfig)
