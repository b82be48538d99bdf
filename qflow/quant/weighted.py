"""Leaf modules that own a weight, and the batch norm that is folded into it.

A convolution whose weight quantizer is on computes with the batch norm folded into the weight, and the batch
norm that follows lets the value through; with the quantizer off both run as in the float model, so that a
prepared model with all quantizers off is the float model bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qflow.quant.leaf import Leaf
from qflow.quant.run import Run


class NormLeaf(Leaf):
    """A batch norm: the identity where the operator before it has already folded it in."""

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        if self.qflow_path in run.folded:
            run.folded.discard(self.qflow_path)
            return args[0] if args else kwargs["input"]
        return super().compute(run, name, *args, **kwargs)


class WeightedLeaf(Leaf):
    """A convolution or linear layer: fake-quantizes its weight, batch norm folded in."""

    weight: Tensor
    bias: Tensor | None
    qflow_norm: nn.Module | None
    qflow_norm_path: str | None

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm's running statistics folded in (plain ones without a norm)."""
        norm = self.qflow_norm
        if norm is None:
            return self.weight, self.bias
        mean, var, eps = norm.running_mean, norm.running_var, norm.eps
        gamma = norm.weight if norm.weight is not None else torch.ones_like(var)  # type: ignore[arg-type]
        beta = norm.bias if norm.bias is not None else torch.zeros_like(mean)  # type: ignore[arg-type]
        factor = gamma * torch.rsqrt(var + eps)  # type: ignore[operator]
        weight = self.weight * self._along_output(factor)
        bias = beta - mean * factor if self.bias is None else beta + (self.bias - mean) * factor  # type: ignore[operator]
        return weight, bias

    def _along_output(self, vector: Tensor) -> Tensor:
        if getattr(self, "transposed", False):
            groups = int(getattr(self, "groups", 1))
            per_group = vector.view(groups, 1, -1).expand(groups, self.weight.shape[0] // groups, -1)
            return per_group.reshape(self.weight.shape[0], -1, *[1] * (self.weight.ndim - 2))
        return vector.view(-1, *[1] * (self.weight.ndim - 1))

    def compute(self, run: Run, name: str, *args: Any, **kwargs: Any) -> Any:
        quantizer = run.weights.get(self.qflow_path)
        if quantizer is None or not quantizer.active:  # None: no output depends on it
            return super().compute(run, name, *args, **kwargs)
        weight, bias = self.folded()
        if self.qflow_norm_path is not None:
            run.folded.add(self.qflow_norm_path)
        run.ran.add(quantizer.name)
        return self.run_with(quantizer(weight), bias, *args, **kwargs)

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        """The operator with another weight and bias."""
        raise AssertionError("every weighted leaf class defines run_with")


class ConvLeaf(WeightedLeaf):
    """Conv1d, Conv2d, Conv3d."""

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return self._conv_forward(input, weight, bias)  # type: ignore[attr-defined, no-any-return]


class LinearLeaf(WeightedLeaf):
    """Linear."""

    def run_with(self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, **kwargs: Any) -> Tensor:
        return F.linear(input, weight, bias)


class ConvTransposeLeaf(WeightedLeaf):
    """ConvTranspose1d, 2d, 3d."""

    def run_with(
        self, weight: Tensor, bias: Tensor | None, input: Tensor, *rest: Any, output_size: Any = None, **kwargs: Any
    ) -> Tensor:
        me: Any = self
        output_size = rest[0] if rest else output_size
        spatial = weight.ndim - 2
        padding = me._output_padding(input, output_size, me.stride, me.padding, me.kernel_size, spatial, me.dilation)
        convolve = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[spatial]
        return convolve(input, weight, bias, me.stride, me.padding, padding, me.groups, me.dilation)
