"""Convolutions whose weights oneDNN has laid out beforehand, because a replay runs them thousands of times.

`F.conv2d` lays out its weight at every call. On small maps that takes longer than the products: a 3 x 3 convolution of
512 channels on four 4 x 4 maps runs at a third of its speed, and 1 x 1 convolutions of few samples leave oneDNN for a
slower path. torch has two operators for weights in oneDNN's layout, which its own compiler uses. They are not
documented, so that a torch without them takes `F.conv2d`, with the same results but for the last bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qflow.quant.model.weighted import ConvLeaf

Convolve = Callable[[Tensor], Tensor]


def packed(leaf: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Convolve | None:
    """The two-dimensional convolution of `leaf` with this weight and bias, for inputs like `x`.

    None if it is another operator, if oneDNN does not have it in float32 on this machine, or if each map is one value,
    which is a product of matrices.
    """
    reorder = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
    convolve = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if reorder is None or convolve is None or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    if not isinstance(leaf, ConvLeaf) or not isinstance(leaf, nn.Conv2d):
        return None
    zeros = leaf.padding_mode == "zeros" and not isinstance(leaf.padding, str)
    plain = all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (x, weight, bias))
    if not (zeros and plain) or x.ndim != 4 or x.shape[-2:].numel() < 2 or not x.numel():
        return None
    geometry = (leaf.padding, leaf.stride, leaf.dilation, leaf.groups)
    laid_out = reorder(weight.contiguous().to_mkldnn(), *geometry, x.shape)
    call = convolve.default
    return lambda value: call(value, laid_out, bias, *geometry, "none", [], "")
