"""What error of the outputs each activation quantizer causes at several scales, from few backward passes.

Let x be what a quantizer reads in the quantized model, q_s(x) its result at scale s, and J the Jacobian of the outputs
by that result, each output divided by the root mean square over the samples of its norm. To first order, the squared
relative error that this quantizer alone causes is

    E_s = mean over samples of |J e_s|^2,     e_s = q_s(x) - x

J is not formed: for a vector v of independent signs, (v^T J e)^2 has the mean |J e|^2 (Hutchinson, Communications in
Statistics 1990), and one backward pass gives v^T J at all quantizers at once. The sum over a sample comes before the
square, so that it keeps what errors of one quantizer have in common: values that are clipped together, channels that
all round to zero. All scales meet the same v and samples, so that their errors are compared in pairs. Rounding passes
gradients on, clipping stops them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model, cut, named_tensors
from qflow.quant.values.fake_quant import FakeQuant
from qflow.quant.values.grid import quantize_dequantize

DIRECTIONS = 2
"""Backward passes for each sample, each with signs of its own."""
AT_ONCE = 16
"""Samples whose gradients are held at a time."""

Scales = Mapping[str, Sequence[float]]
"""Quantizer -> scales to try."""
Call = tuple[str, Tensor, Tensor]
"""A quantizer's name, what it read, and its result, which the backward pass reaches."""


def output_errors(prepared: QuantizedModel, batches: Sequence[tuple[Any, int]], scales: Scales) -> dict[str, Tensor]:
    """Return quantizer -> estimates of E for each scale, float64 [scales, samples x directions].

    `prepared` is calibrated and in eval mode; `batches` are model inputs with their number of samples. Values may be
    not finite where gradients are. A quantizer that no output depends on, or by no gradient, is left out.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Tensor]] = {}
    for inputs, size in batches:
        for begin in range(0, size, AT_ONCE):
            end = min(begin + AT_ONCE, size)
            part = cut(inputs, size, begin, end) if end - begin < size else inputs
            for name, estimates in _estimates(prepared, part, end - begin, scales, generator).items():
                found.setdefault(name, []).append(estimates)
    return {name: torch.cat(estimates, 1) for name, estimates in found.items()}


def _estimates(
    prepared: QuantizedModel, inputs: Any, samples: int, scales: Scales, generator: torch.Generator
) -> dict[str, Tensor]:
    with torch.enable_grad(), _recorded(prepared, scales) as calls, prepared.quantized():
        outputs = dict(named_tensors(call_model(prepared, inputs)))
        projections = [_projected(outputs, samples, generator) for _ in range(DIRECTIONS)]
    results = [result for _, _, result in calls]
    if not results or not all(p.requires_grad for p in projections):
        return {}
    sums: dict[str, Tensor] = {}
    gradients = [
        torch.autograd.grad(projection, results, retain_graph=d + 1 < DIRECTIONS, allow_unused=True)
        for d, projection in enumerate(projections)
    ]
    for (name, x, _), *given in zip(calls, *gradients, strict=True):
        if given[0] is None:
            continue
        own = _products(prepared.outputs[name], x, torch.stack(given), scales[name], samples)
        sums[name] = _added(sums[name], own) if name in sums else own
    return {name: found.square().reshape(len(found), -1).cpu() for name, found in sums.items()}


def _added(one: Tensor, other: Tensor) -> Tensor:
    """The errors of two calls of a quantizer, [scales, directions, rows], which act on the outputs together."""
    if one.shape != other.shape:
        one, other = one.sum(2, keepdim=True), other.sum(2, keepdim=True)
    return one + other


def _projected(outputs: Mapping[str, Tensor], samples: int, generator: torch.Generator) -> Tensor:
    """v^T of all outputs, each divided by the root mean square of its norm over the samples."""
    total = torch.zeros(())
    for output in outputs.values():
        if not output.is_floating_point() or not output.numel():
            continue
        unit = float(output.detach().double().square().sum() / samples) ** 0.5
        if unit and math.isfinite(unit):
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            total = total + (signs.to(output) * output).sum() / unit
    return total


def _products(quantizer: FakeQuant, x: Tensor, gradients: Tensor, scales: Sequence[float], samples: int) -> Tensor:
    """v^T J e for each scale, direction and sample, float64 [scales, directions, rows].

    Where the first axis does not hold the samples, all of them make one row, which has the same mean.
    """
    assert quantizer.dtype is not None
    rows = samples if x.ndim and len(x) % samples == 0 and len(x) else 1
    values = gradients.reshape(len(gradients), rows, -1).to(x)
    found = []
    for scale in scales:
        error = quantize_dequantize(x, scale, quantizer.dtype.qmin, quantizer.dtype.qmax).sub_(x)
        if quantizer.keeps_mask:
            error.masked_fill_(torch.isneginf(x), 0.0)
        found.append(torch.einsum("drk,rk->dr", values, error.reshape(rows, -1)).double())
    return torch.stack(found)


@contextmanager
def _recorded(prepared: QuantizedModel, scales: Scales) -> Iterator[list[Call]]:
    """Record of each call of these quantizers what it read, and its result."""
    calls: list[Call] = []

    def recorded(name: str, x: Tensor, result: Tensor) -> Tensor:
        result = result if result.requires_grad else result.detach().requires_grad_()
        calls.append((name, x, result))
        return result.clone()  # the model may write into it

    hooks = [
        prepared.outputs[name].register_forward_hook(
            lambda _, args, result, name=name: recorded(name, args[0].detach(), result)
        )
        for name in scales
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
