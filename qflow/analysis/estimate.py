"""Sensitivity of every quantizer from one float forward and a few backward passes: second order, by random directions.

With dx what a quantizer changes at its op and J the outputs' derivative by it, the outputs move by about J dx. For a
random direction v over the outputs with E[v v^T] = W, the backward pass gives g = J^T v at every op at once, and

    E[(g . dx)^2] = (J dx)^T W (J dx)                     the squared change of the outputs in the norm of W

estimated for each sample, dx summed over the calls of a shared module before it is squared (Hutchinson's estimator;
error about sqrt(2 / (draws x samples)) of the square). W is chosen so that this norm is the metric's own:

    L1, MSE   1 / (n mean|y|^2) for each output of n elements: mean squared error over the squared size
    SQNR      1 / |y|^2                               Cosine   the same, without the part along y
    KL        (diag p - p p^T) / n, p the softmax     (its second order; scores are half of it, as with Cosine)

L1 takes sqrt(2 / pi) of the root mean square, as for normal errors. Atol is a maximum and has no such form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qflow.analysis.tables import SensitivityRow
from qflow.core.settings import SensitivitySettings
from qflow.quant.calling import batch_size
from qflow.quant.capture import Captured
from qflow.quant.ops import function_name
from qflow.quant.quantized_model import QuantizedModel
from qflow.quant.rerun import Ops, Values, Variant
from qflow.quant.tape import Op
from qflow.quant.widen import sample_axes


def estimable(metric: str) -> bool:
    """True where the metric has a second order."""
    return metric in ("L1", "MSE", "SQNR", "Cosine", "KL")


def passes(samples: int, draws: int) -> float:
    """About how many float forwards an estimate costs: one with its graph and all dx, and the backward passes."""
    return 3.5 + 1.5 * math.ceil(draws / max(samples, 1))


def estimate(
    model: nn.Module,
    prepared: QuantizedModel,
    variants: Sequence[Variant],
    chunks: Sequence[Any],
    settings: SensitivitySettings,
    captured: Callable[[int, Any], Captured],
) -> list[tuple[float, float]]:
    """(score, its standard error) of each variant, merged over outputs, in the units of `settings.metric`.

    `captured(n, inputs)` gives the n-th chunk's ops. The score is NaN where a derivative says nothing: the way to the
    outputs leads through rounding, a sign, a comparison or an index, or no gradient arrives at all.
    """
    samples = sum(batch_size(inputs) for inputs in chunks)
    draws = max(1, math.ceil(settings.draws / samples))
    squares: list[list[Tensor]] = [[] for _ in variants]
    axes: dict[int, dict[int, int | None]] = {}  # by chunk size: the same code has the same axes
    for n, inputs in enumerate(chunks):
        generator = torch.Generator().manual_seed(settings.seed * 1009 + n)
        found, size = captured(n, inputs), batch_size(inputs)
        ops = Ops(model, prepared, found)
        if size not in axes:
            axes[size] = sample_axes(model, prepared, ops, inputs, found, size)
        backward = _Backward(model, ops, variants, found, axes[size], (size, draws))
        doubtful = backward.doubtful()
        for v, values in enumerate(backward.squares(settings.metric, generator)):
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
    """True where the result jumps: its derivative is zero, or it is no float."""
    function = op.call.function if op.call is not None else None
    return not op.floating or (function is not None and function_name(function) in _STEPS)


class _Backward:
    """One chunk's forward pass with gradients kept, and what each variant would change at its ops."""

    def __init__(
        self,
        model: nn.Module,
        ops: Ops,
        variants: Sequence[Variant],
        captured: Captured,
        axes: dict[int, int | None],
        amounts: tuple[int, int],
    ) -> None:
        self.model, self.variants = model, variants
        self.ops, self.given, self.axes = ops, captured.inputs, axes
        self.size, self.draws = amounts
        self.by_index = {op.index: op for op in self.ops.ops}
        self.at: dict[int, list[tuple[int, Any]]] = {}
        for v, variant in enumerate(variants):
            for patch in self.ops.of(variant) if self.ops.reaches(variant) else ():
                self.at.setdefault(patch.op, []).append((v, patch))
        self.sums: dict[int, Tensor] = {}
        self.starts: list[Tensor] = []

    def doubtful(self) -> set[int]:
        """Variants that reach the outputs through an op whose derivative is zero or that gives no float."""
        blind: set[int] = set()
        for op in reversed(self.ops.ops):
            if _steps(op) and op.call is not None:
                blind.update(i for i in self.ops.reads[op.index] if self.by_index[i].floating)
            if op.index in blind:
                blind.update(self.ops.reads[op.index])
        return {v for index, found in self.at.items() for v, patch in found if patch.at in blind or index in blind}

    def squares(self, metric: str, generator: torch.Generator) -> list[Tensor]:
        """For each variant (g . dx)^2 by draw and sample [draws x B]."""
        found: list[list[Tensor]] = [[] for _ in self.variants]
        with frozen(self.model), torch.enable_grad():
            outputs = [t for t in self._forward() if t.requires_grad]
            for draw in range(self.draws):
                self.sums = {}
                directions = [_direction(metric, y.detach(), self.size, generator) for y in outputs]
                more = draw + 1 < self.draws
                torch.autograd.grad(
                    outputs, self.starts, directions, retain_graph=more, allow_unused=True, materialize_grads=False
                )
                for v in range(len(self.variants)):
                    found[v].append(self.sums.get(v, torch.zeros(self.size)).double().square().cpu())
        return [torch.cat(parts) for parts in found]

    def _forward(self) -> list[Tensor]:
        values: dict[int, Values] = {}
        waiting: dict[int, list[tuple[int, Callable[[Tensor], Tensor]]]] = {}
        for op in self.ops.ops:
            if op.index in self.given:
                values[op.index] = (self.given[op.index],)
                args: Any = ()
                kwargs: Any = {}
            else:
                assert op.call is not None
                args, kwargs = self.ops.arguments(
                    (op.call.args, op.call.kwargs), lambda ref: values[ref.op][ref.position]
                )
                detached = op.call.function is not None and function_name(op.call.function) in ("detach", "data")
                values[op.index] = (args[0],) if detached else self.ops.run(op, args, kwargs)
            for v, patch in self.at.get(op.index, ()):
                change = self._change(op, patch, v, args, kwargs, values)
                waiting.setdefault(patch.at, []).append((v, change))
            if op.index in waiting:
                values[op.index] = self._tapped(op, values[op.index], waiting.pop(op.index))
            for index in self.ops.reads[op.index]:
                if self.ops.last_use[index] <= op.index:
                    values.pop(index, None)
        return [values[ref.op][ref.position] for _, ref in self.ops.outputs]

    def _change(
        self, op: Op, patch: Any, v: int, args: Any, kwargs: Any, values: dict[int, Values]
    ) -> Callable[[Tensor], Tensor]:
        """Dx as a function of the op's own float value; kept where several draws ask for it."""
        quantizer = self.variants[v].quantizer
        kept: list[Tensor] = []

        def change(value: Tensor) -> Tensor:
            if kept:
                return kept[0]
            with torch.no_grad():
                if patch.kind == "result":
                    found = quantizer(value) - value
                else:
                    found = self.ops.patched(op, patch, quantizer, args, kwargs)[0] - value
            found = torch.nan_to_num(found, 0.0, 0.0, 0.0)
            if self.draws > 1:
                kept.append(found)
            return found

        return change

    def _tapped(self, op: Op, values: Values, changes: Sequence[tuple[int, Callable[[Tensor], Tensor]]]) -> Values:
        """The values with a hook that sums g . dx over each sample as soon as g is there."""
        first = values[0]
        if not first.requires_grad:
            first = first.detach().requires_grad_()
            self.starts.append(first)
        held = first.detach()

        def hook(gradient: Tensor) -> None:
            for v, change in changes:
                total = self._by_sample(op.index, gradient * change(held))
                self.sums[v] = self.sums[v] + total if v in self.sums else total

        first.register_hook(hook)  # type: ignore[no-untyped-call]
        return (first, *values[1:])

    def _by_sample(self, index: int, product: Tensor) -> Tensor:
        axis = self.axes.get(index)
        if axis is None:  # no sample axis: the whole tensor belongs to all
            return product.sum() / math.sqrt(self.size) * torch.ones(self.size)
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


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for the parameters: only values carry one."""
    asleep = [p for p in model.parameters() if p.requires_grad]
    for parameter in asleep:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asleep:
            parameter.requires_grad_(True)


def in_one_unit(
    made: Sequence[SensitivityRow], guessed: Sequence[tuple[float, float]], found: Mapping[int, SensitivityRow]
) -> tuple[list[SensitivityRow], str]:
    """Estimated rows scaled by what the measured ones teach, and how far the estimate was off ("" if none was scaled).

    `guessed` and `found` go by the position of a row in `made`.
    """
    ratios = sorted(found[i].score / guessed[i][0] for i in found if guessed[i][0] > 0 and found[i].score > 0)
    if not ratios:
        return list(made), ""
    factor = ratios[len(ratios) // 2]
    off = sorted(abs(math.log2(r / factor)) for r in ratios)
    text = (
        f"estimates, scaled by {factor:.2f}, are off by a factor of {2 ** off[len(off) // 2]:.2f} in the median "
        f"and {2 ** off[int(0.9 * (len(off) - 1))]:.2f} in one of ten, on the {len(ratios)} measured rows"
    )
    return [r if r.exact else replace(r, score=r.score * factor, spread=r.spread * factor) for r in made], text
