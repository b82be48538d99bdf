"""Observers: the range of a tensor from batches, as moving averages of min and max."""

import torch
from torch import nn

from horizon_plugin_pytorch import MissingFact
from horizon_plugin_pytorch.dtype import qint8

EPS = torch.finfo(torch.float32).eps


def scale_of(low, high, dtype):
    """The symmetric scale of a range: its larger side over half the number of steps."""
    half = (dtype.max - dtype.min) / 2
    side = torch.maximum(torch.maximum(-low, high), torch.zeros_like(high))
    return (side / half).clamp_min(EPS)


def rounded(x, scale, dtype):
    return torch.clamp(torch.round(x / scale), dtype.min, dtype.max) * scale


class MinMaxObserver(nn.Module):
    def __init__(
        self, averaging_constant=0.01, ch_axis=-1, dtype=qint8, qscheme=None, quant_min=None, quant_max=None,
        is_sync_quantize=False, factory_kwargs=None,
    ):  # fmt: skip
        super().__init__()
        if qscheme is not None or quant_min is not None or quant_max is not None or is_sync_quantize:
            raise MissingFact("the stand-in takes the ranges of a dtype, in one process")
        self.averaging_constant, self.ch_axis, self.dtype = averaging_constant, ch_axis, dtype
        self.low = self.high = None

    def forward(self, x):
        if x.numel() == 0:
            return
        low, high = self.range(x.detach())
        if self.low is None:
            self.low, self.high = low, high
        else:
            self.low = self.low + self.averaging_constant * (low - self.low)
            self.high = self.high + self.averaging_constant * (high - self.high)

    def range(self, x):
        if self.ch_axis == -1:
            return torch.aminmax(x)
        return torch.aminmax(x.transpose(0, self.ch_axis).flatten(1), dim=1)

    def calculate_qparams(self):
        return None if self.low is None else scale_of(self.low, self.high, self.dtype)


class FixedScaleObserver(MinMaxObserver):
    def __init__(self, scale=1, zero_point=0, averaging_constant=0, **more):
        super().__init__(averaging_constant, **more)
        if scale <= 0 or zero_point != 0:
            raise ValueError(f"a fixed scale is above 0 and its zero point 0, got {scale}, {zero_point}")
        self.fixed = float(scale)

    def forward(self, x):
        pass

    def calculate_qparams(self):
        return torch.tensor(self.fixed)


class ClipObserver(MinMaxObserver):
    def __init__(self, xmin=-1.0, xmax=1.0, averaging_constant=1.0, **more):
        super().__init__(averaging_constant, **more)
        self.xmin, self.xmax = xmin, xmax

    def forward(self, x):
        super().forward(x)
        if self.low is not None:
            self.low, self.high = self.low.clamp(self.xmin, self.xmax), self.high.clamp(self.xmin, self.xmax)


class PercentileObserver(MinMaxObserver):
    def __init__(self, percentile=99.99, bins=2048, **more):
        super().__init__(**more)
        self.percentile, self.bins = percentile, bins

    def range(self, x):
        low, high = torch.aminmax(x)
        clip = percentile_of(x, self.percentile / 100, self.bins)
        return low.clamp(-clip, clip), high.clamp(-clip, clip)


def percentile_of(x, share, bins):
    """The middle of the first bin of |x| at which `share` of the values are counted."""
    size = x.abs()
    top = float(size.max())
    if top == 0.0:
        return 0.0
    counted = torch.histc(size, bins, 0.0, top).cumsum(0)
    first = int((counted >= share * size.numel()).nonzero()[0])
    return (first + 0.5) * top / bins


class ClipStdObserver(MinMaxObserver):
    def __init__(self, std_scale=3.0, **more):
        super().__init__(**more)
        self.std_scale = std_scale

    def range(self, x):
        low, high = torch.aminmax(x)
        mean, reach = float(x.mean()), self.std_scale * float(x.std())
        return low.clamp(mean - reach, mean + reach), high.clamp(mean - reach, mean + reach)


class MSEObserver(MinMaxObserver):
    def __init__(self, stride=1, **more):
        super().__init__(**more)
        self.stride = stride

    def range(self, x):
        if self.ch_axis != -1:
            raise MissingFact("the stand-in searches one range for a tensor")
        low, high = torch.aminmax(x)
        best, least = 1.0, None
        for i in range(0, 95, self.stride):
            factor = 1 - 0.01 * i
            error = torch.norm(x - rounded(x, scale_of(low * factor, high * factor, self.dtype), self.dtype))
            if least is None or error <= least:  # of equal errors the smaller range
                best, least = factor, error
        return low * best, high * best


class MixObserver(MinMaxObserver):
    SHARES = (0.999, 0.9995, 0.9999, 0.99993, 0.99995, 0.99997, 0.99999, 0.999995, 0.999999)

    def range(self, x):
        clips = dict.fromkeys(percentile_of(x, share, 2048) for share in self.SHARES)
        ranges = [[side.clamp(-clip, clip) for side in torch.aminmax(x)] for clip in clips]
        return min(ranges, key=lambda r: float(torch.norm(x - rounded(x, scale_of(*r, self.dtype), self.dtype))))


class KLObserver(MinMaxObserver):
    def __init__(self, bins=512, update_interval=1, **more):
        raise MissingFact("the stand-in has no KL divergence")
