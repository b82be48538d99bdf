"""Estimates the sensitivity of every quantizer from one float forward pass and a few backward passes (second order).

Let dx be the change that a quantizer makes to the result of its operator, and J the derivative of the outputs by that
result: the outputs move by about J dx. For a random direction v over the outputs with E[v v^T] = W, one backward pass
gives g = J^T v at every operator, and

    E[(g . dx)^2] = (J dx)^T W (J dx)                     the squared change of the outputs in the norm of W

is estimated for each sample; g . dx is summed over the calls of a shared module before it is squared. This is
Hutchinson's estimator; the relative error of the square is about sqrt(2 / (draws x samples)). W is chosen so that the
norm equals the metric:

    L1, MSE   1 / (n mean|y|^2) for each output of n elements: mean squared error over the squared size
    SQNR      1 / |y|^2                               Cosine   the same, without the part along y
    KL        (diag p - p p^T) / n, p the softmax     (its second order; scores are half of it, as with Cosine)

L1 takes sqrt(2 / pi) of the root mean square, as for normal errors. Atol is a maximum and has no such form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.measures.tables import SensitivityRow
from qflow.core.settings import SensitivitySettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.backward import Backward
from qflow.quant.replay.capture import Captured
from qflow.quant.replay.captured_ops import Patch, Variant, Weights
from qflow.quant.replay.fused import FoldedOps
from qflow.quant.replay.widen import first_axes
from qflow.quant.trace.calling import batch_size
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.tape import Op, Ref

AT_ONCE = 8
"""Random directions of one backward pass: each needs memory for a gradient of every value in use."""


def estimable(metric: str) -> bool:
    """True if the metric has a second-order form."""
    return metric in ("L1", "MSE", "SQNR", "Cosine", "KL")


def passes(samples: int, draws: int) -> float:
    """Approximate cost of an estimate in float forward passes: a capture, all dx, and a backward pass of every draw."""
    return 3.0 + 2.0 * math.ceil(draws / max(samples, 1))  # measured: 3.3, 1.4 on large networks; 5, 2.4 on small


def estimate(
    model: nn.Module,
    prepared: QuantizedModel,
    variants: Sequence[Variant],
    chunks: Sequence[Any],
    settings: SensitivitySettings,
    captured: Callable[[int, Any], Captured],
) -> list[tuple[float, float]]:
    """(score, its standard error) of each variant, merged over outputs, in the units of `settings.metric`.

    `captured(n, inputs)` gives the capture of the n-th chunk. The score is NaN where a derivative cannot give it: the
    path to the outputs contains rounding, a sign, a comparison or an index, or no gradient arrives at all.
    """
    samples = sum(batch_size(inputs) for inputs in chunks)
    draws = max(1, math.ceil(settings.draws / samples))
    squares: list[list[Tensor]] = [[] for _ in variants]
    weights: Weights = {}
    axes: dict[int, dict[int, int | None]] = {}  # by chunk size: the same code has the same axes
    for n, inputs in enumerate(chunks):
        generator = torch.Generator().manual_seed(settings.seed * 1009 + n)
        found, size = captured(n, inputs), batch_size(inputs)
        ops = FoldedOps(model, prepared, found, weights)
        if size not in axes:
            axes[size] = first_axes(model, prepared, ops, inputs, found, size)
        chunk = _Estimate(ops, variants, found, axes[size], size)
        doubtful = chunk.doubtful()
        for v, values in enumerate(chunk.squares(settings.metric, draws, generator)):
            squares[v].append(torch.full_like(values, math.nan) if v in doubtful or not values.any() else values)
    return [_score(settings.metric, torch.cat(values)) for values in squares]


def _score(metric: str, squares: Tensor) -> tuple[float, float]:
    if bool(squares.isnan().any()):
        return math.nan, math.nan
    mean = float(squares.mean())
    error = float(squares.std()) / math.sqrt(len(squares)) if len(squares) > 1 else mean * math.sqrt(2.0)
    if metric == "MSE":
        return mean, error
    if metric in ("Cosine", "KL"):
        return 0.5 * mean, 0.5 * error
    factor = math.sqrt(2.0 / math.pi) if metric == "L1" else 1.0
    root = math.sqrt(mean)
    return factor * root, factor * error / (2.0 * root) if root else 0.0


_STEPS = frozenset(["round", "floor", "ceil", "trunc", "sign", "sgn", "floor_divide", "heaviside", "one_hot"])


def _steps(op: Op) -> bool:
    """True if the result is a step function, whose derivative is zero, or is not floating."""
    function = op.call.function if op.call is not None else None
    return not op.floating or (function is not None and function_name(function) in _STEPS)


class _Estimate:
    """The estimate on one chunk: the change that each variant makes at its operators, times the gradients there."""

    def __init__(
        self,
        ops: FoldedOps,
        variants: Sequence[Variant],
        captured: Captured,
        axes: dict[int, int | None],
        size: int,
    ) -> None:
        self.ops, self.variants, self.captured, self.axes, self.size = ops, variants, captured, axes, size
        self.by_index = {op.index: op for op in ops.ops}
        self.at: dict[int, list[tuple[int, Patch]]] = {}
        """Operator whose result changes -> the variants that change it, and where they act."""
        for v, variant in enumerate(variants):
            for patch in ops.of(variant) if ops.reaches(variant) else ():
                self.at.setdefault(patch.at, []).append((v, patch))

    def doubtful(self) -> set[int]:
        """Variants whose path to the outputs contains an operator with derivative zero or a result that is no float."""
        blind: set[int] = set()
        for op in reversed(self.ops.ops):
            if _steps(op) and op.call is not None:
                blind.update(i for i in self.ops.reads[op.index] if self.by_index[i].floating)
            if op.index in blind:
                blind.update(self.ops.reads[op.index])
        return {v for found in self.at.values() for v, patch in found if patch.at in blind or patch.op in blind}

    def squares(self, metric: str, draws: int, generator: torch.Generator) -> list[Tensor]:
        """For each variant (g . dx)^2 of every draw and sample [draws x B]."""
        sums: dict[int, list[Tensor]] = {}
        backward = Backward(self.ops, self.captured, self.at)
        outputs = backward.outputs()
        for begin in range(0, draws, AT_ONCE):
            directions = [
                [(ref, _direction(metric, y, self.size, generator)) for ref, y in outputs]
                for _ in range(begin, min(begin + AT_ONCE, draws))
            ]
            made: dict[int, list[Tensor]] = {}
            for op, value, gradients in backward.walk(directions):
                for v, patch in self.at[op.index]:
                    change = self._change(patch, v, value, backward.value)
                    parts = [self._by_sample(op.index, gradient * change) for gradient in gradients[:-1]]
                    parts.append(self._by_sample(op.index, change.mul_(gradients[-1])))
                    made[v] = [a + b for a, b in zip(made[v], parts, strict=True)] if v in made else parts
            for v, parts in made.items():
                sums.setdefault(v, []).extend(parts)
        none = torch.zeros(draws * self.size, dtype=torch.float64)
        return [torch.cat(sums[v]).double().square().cpu() if v in sums else none for v in range(len(self.variants))]

    def _change(self, patch: Patch, v: int, value: Tensor, of: Callable[[Ref], Tensor]) -> Tensor:
        """The change that the variant makes to an operator's float result `value`."""
        quantizer, op = self.variants[v].quantizer, self.by_index[patch.op]
        if patch.kind == "result":
            return torch.nan_to_num_(quantizer(value) - value, 0.0, 0.0, 0.0)
        assert op.call is not None
        args, kwargs = self.ops.arguments((op.call.args, op.call.kwargs), of)
        if patch.kind == "weight":
            return torch.nan_to_num_(self.ops.change(op, quantizer, args, kwargs), 0.0, 0.0, 0.0)
        return torch.nan_to_num_(self.ops.patched(op, patch, quantizer, args, kwargs)[0] - value, 0.0, 0.0, 0.0)

    def _by_sample(self, index: int, product: Tensor) -> Tensor:
        axis = self.axes.get(index)
        if axis is None:  # without a sample axis the tensor belongs to all samples
            return product.sum() / math.sqrt(self.size) * product.new_ones(self.size)
        if product.shape[axis] == self.size:
            rest = [d for d in range(product.ndim) if d != axis]
            return product.sum(rest) if rest else product
        return product.movedim(axis, 0).reshape(self.size, -1).sum(1)


def _direction(metric: str, y: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random direction over one output; see the module's formulas for its covariance."""
    v = torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)
    rows = size if y.ndim and len(y) == size else 1
    if metric in ("L1", "MSE"):
        mean = float(y.abs().mean()) or 1.0
        return v / (mean * math.sqrt(y.numel() / rows))
    if metric == "KL":
        dim = 1 if y.ndim > 2 else -1
        p = y.softmax(dim)
        v = p.sqrt() * v
        return (v - p * v.sum(dim, keepdim=True)) / math.sqrt(y.numel() / rows)
    a, b = y.reshape(rows, -1), v.reshape(rows, -1)
    norm = a.norm(dim=1, keepdim=True).clamp_min(1e-30)
    if metric == "Cosine":
        b = b - (a * b).sum(1, keepdim=True) / norm.square() * a
    direction: Tensor = (b / norm).reshape(y.shape)
    return direction


def in_one_unit(
    made: Sequence[SensitivityRow], guessed: Sequence[tuple[float, float]], found: Mapping[int, SensitivityRow]
) -> tuple[list[SensitivityRow], str]:
    """`made` with estimates scaled to the measured rows, and a sentence on their error ("" if none was scaled).

    The factor is the median ratio of a measured score to its estimate. `guessed` holds the estimate of every row of
    `made`, `found` the measured rows by their position there.
    """
    ratios = sorted(found[i].score / guessed[i][0] for i in found if guessed[i][0] > 0 and found[i].score > 0)
    if not ratios:
        return list(made), ""
    factor = ratios[len(ratios) // 2]
    off = sorted(abs(math.log2(r / factor)) for r in ratios)
    text = (
        f"estimates, scaled by {factor:.2f}, are off by a factor of {2 ** off[len(off) // 2]:.2f} in the median "
        f"and {2 ** off[int(0.9 * (len(off) - 1))]:.2f} at the 90th percentile of the {len(ratios)} measured rows"
    )
    return [r if r.exact else replace(r, score=r.score * factor, spread=r.spread * factor) for r in made], text
