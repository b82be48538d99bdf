"""Fake quantizers, casts, and the states of a prepared model."""

import warnings
from enum import Enum
from functools import partial

import torch
from torch import nn

from horizon_plugin_pytorch import MissingFact
from horizon_plugin_pytorch.dtype import QuantDType, qint8
from horizon_plugin_pytorch.quantization.observer_v2 import MinMaxObserver, rounded


class FakeQuantState(Enum):
    QAT = "qat"
    CALIBRATION = "calibration"
    VALIDATION = "validation"
    _FLOAT = "_float"


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, dtype):
        ctx.save_for_backward((x >= dtype.min * scale) & (x <= dtype.max * scale))
        return rounded(x, scale, dtype)

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


class FakeQuantize(nn.Module):
    def __init__(self, observer=MinMaxObserver, dtype=qint8, **observer_kwargs):
        super().__init__()
        if not isinstance(dtype, QuantDType):
            raise TypeError(f"a fake quantizer has an integer dtype, got {dtype}")
        self.dtype = dtype
        self.activation_post_process = observer(dtype=dtype, **observer_kwargs)
        self.ch_axis = self.activation_post_process.ch_axis
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int64))
        self.fake_quant_enabled = self.observer_enabled = True

    @classmethod
    def with_args(cls, **kwargs):
        return partial(cls, **kwargs)

    def get_dtype(self):
        return self.dtype

    def enable_fake_quant(self, enabled=True):
        self.fake_quant_enabled = enabled

    def forward(self, x):
        if self.observer_enabled and self.training:
            self.activation_post_process(x)
            self.take_scale()
        if not self.fake_quant_enabled:
            return x
        scale = self.scale
        if self.ch_axis != -1:
            scale = scale.reshape([-1 if i == self.ch_axis else 1 for i in range(x.ndim)])
        return StraightThrough.apply(x, scale, self.dtype)

    def take_scale(self):
        found = self.activation_post_process.calculate_qparams()
        if found is None:
            warnings.warn("nothing was observed: the scale stays 1", stacklevel=2)
            return
        self.scale = found.reshape(-1)
        self.zero_point = torch.zeros(len(self.scale), dtype=torch.int64)


class FakeCast(nn.Module):
    enable_clip, check_overflow = False, False

    def __init__(self, dtype, enable_clip=None, check_overflow=None):
        super().__init__()
        if dtype not in (torch.float16, torch.float32, torch.bool):
            raise TypeError(f"a cast is to float16, float32 or bool, got {dtype}")
        self.dtype, self.enabled = dtype, True

    def get_dtype(self):
        return self.dtype

    def enable_fake_quant(self, enabled=True):
        self.enabled = enabled

    def forward(self, x):
        return x.half().float() if self.enabled and self.dtype == torch.float16 else x.float()


def set_fake_quantize(model, state):
    if not isinstance(state, FakeQuantState):
        raise TypeError(f"a state is a FakeQuantState, got {state}")
    if state is FakeQuantState.QAT and not model.training:
        raise MissingFact("what QAT does to a model in eval mode")
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.fake_quant_enabled = state in (FakeQuantState.QAT, FakeQuantState.VALIDATION)
            module.observer_enabled = state in (FakeQuantState.QAT, FakeQuantState.CALIBRATION)
            if state is FakeQuantState.CALIBRATION:  # a later model.eval() stops it without a word
                module.train()
        elif isinstance(module, FakeCast):
            module.enable_fake_quant(state in (FakeQuantState.QAT, FakeQuantState.VALIDATION))
