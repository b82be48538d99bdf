"""Norms and softmaxes written out: what the device computes inside one operator, value by value.

Horizon's tool chain splits a layer norm into mean, variance, rsqrt and products, and a softmax into sub, exp, sum,
reciprocal and mul. The values between these steps are int16, whatever the qconfig of the operator is (the guide's
table has a row `norm3.var_mean.pre_mean` at qint16 in an int8 model). A formula here gives each of them to `node` under
its name, and goes on with what `node` returns. The result of the last step is that of the operator, which has a
quantizer anyway.

    layer, group, instance norm   m = mean(x); d = x - m; v = mean(d^2); r = 1 / sqrt(v + eps); d r w + b
    RMS norm                      v = mean(x^2); r = 1 / sqrt(v + eps); x r w
    softmax                       d = max(x - max(x), -18); e = exp(d); s = sum(e); e / s
    log-softmax                   d = x - max(x); e = exp(d); s = sum(e); d - log(s)

The device accumulates sums in a wider integer, so d^2 has no node. In a softmax, exp(-18) = 1.5e-8 is 0 in int16 and in
fp16; without that bound a mask of -10000 would take all codes of d.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qflow.quant.trace.decompose import safe_softmax

Node = Callable[[str, Tensor], Tensor]
"""Maps the name of an inner value and the value to the value that the formula goes on with."""
REACH = 18.0


class Written(NamedTuple):
    """An operator call as a formula and its arguments."""

    formula: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, node: Node) -> Tensor:
        """The operator's result, with `node` between its steps."""
        return self.formula(node, *self.args, **self.kwargs)


def inner_names(target: Any, args: Any, kwargs: Any) -> tuple[str, ...]:
    """Names of the inner values of a call, in order; () if no formula is known. Nothing is computed."""
    written = written_out(target, args, kwargs)
    if written is None:
        return ()
    given = tuple(_kind(v) for v in written.args), tuple((key, _kind(v)) for key, v in written.kwargs.items())
    key = written.formula, *given
    if key not in _NAMES:
        _NAMES[key] = _names(written)
    return _NAMES[key]


def _kind(value: Any) -> Any:
    """What the names depend on: which arguments are given, and which are on; not on their shapes."""
    return value if value is None or isinstance(value, bool) else type(value)


def _names(written: Written) -> tuple[str, ...]:
    """The names, from a run on the meta device, which takes longer than the operator itself."""
    found: list[str] = []

    def node(name: str, value: Tensor) -> Tensor:
        found.append(name)
        return value

    shapes = tree_map_only(Tensor, lambda t: t.detach().to("meta"), (written.args, written.kwargs))
    with torch.no_grad():
        Written(written.formula, *shapes).run(node)
    return tuple(found)


def written_out(target: Any, args: Any, kwargs: Any) -> Written | None:
    """The call of a leaf module or function as a formula; None if none is known."""
    if not isinstance(target, nn.Module):
        formula = _FUNCTIONS.get(target)
        return None if formula is None or "out" in kwargs else Written(formula, tuple(args), kwargs)
    bind = next((_MODULES[cls] for cls in type(target).__mro__ if cls in _MODULES), None)
    return None if bind is None else bind(target, args[0] if args else kwargs["input"])


def _layer_norm(
    node: Node, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(node, _standardized(node, _wide(input), dims, eps), weight, bias)


def _group_norm(
    node: Node, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *_: Any, **__: Any,
) -> Tensor:  # fmt: skip
    x = _wide(input)
    grouped = x.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    out = _standardized(node, grouped, (-1,), eps).reshape(x.shape)
    channels = (-1, *[1] * (x.ndim - 2))
    return _affine(node, out, *(None if t is None else t.view(channels) for t in (weight, bias)))


def _instance_norm(
    node: Node, input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:  # a product and a sum with constants
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    return _group_norm(node, input, input.shape[1], weight, bias, eps)


def _rms_norm(
    node: Node, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    x, dims = _wide(input), tuple(range(-len(normalized_shape), 0))
    squares = node("mean", x.square().mean(dims, keepdim=True))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(node, x * node("rsqrt", torch.rsqrt(squares + eps)), weight, None)


def _standardized(node: Node, x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - node("var_mean.pre_mean", x.mean(dims, keepdim=True))
    count = math.prod([x.shape[d] for d in dims])
    squares = torch.linalg.vector_norm(centred, dim=dims, keepdim=True).square()
    rsqrt = node("rsqrt", torch.rsqrt(node("var_mean.var", squares / count) + eps))
    return _own(torch.mul, centred, rsqrt)


def _affine(node: Node, out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`out` * weight + bias. The first product is an inner value if a step follows it."""
    if weight is not None:
        out = _own(torch.mul, node("mul", out), weight)
    return out if bias is None else _own(torch.add, node("mul" if weight is None else "weight_mul", out), bias)


def _own(function: Callable[..., Tensor], own: Tensor, *more: Any) -> Tensor:
    """`function(own, *more)`; without gradients in place, because new memory costs as much as the arithmetic."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or own.is_meta:
        return function(own, *more)
    return function(own, *more, out=own)


def _softmax(node: Node, input: Tensor, dim: int | None = None, *more: Any, dtype: Any = None, **_: Any) -> Tensor:
    x, dim = _scores(input, dim, more, dtype)
    sub = node("sub", _own(torch.clamp_min, x - x.amax(dim, keepdim=True).detach(), -REACH))
    exp = node("exp", _own(torch.exp, sub))
    return _own(torch.mul, exp, node("reciprocal", node("sum", exp.sum(dim, keepdim=True)).reciprocal()))


def _safe_softmax(node: Node, input: Tensor, dim: int) -> Tensor:
    hidden = torch.isneginf(input).all(dim, keepdim=True)
    return _softmax(node, input.masked_fill(hidden, 0.0), dim).masked_fill(hidden, 0.0)


def _log_softmax(node: Node, input: Tensor, dim: int | None = None, *more: Any, dtype: Any = None, **_: Any) -> Tensor:
    x, dim = _scores(input, dim, more, dtype)
    sub = node("sub", x - x.amax(dim, keepdim=True).detach())
    sub = torch.where(torch.isneginf(x), x, sub)  # no code stands for a mask of -inf
    return sub - node("log", node("sum", node("exp", sub.exp()).sum(dim, keepdim=True)).log())


def _scores(input: Tensor, dim: int | None, more: tuple[Any, ...], dtype: Any) -> tuple[Tensor, int]:
    """The scores of a softmax in the dtype that the call asks for, and its axis (torch's choice for None)."""
    dtype = next((value for value in more if isinstance(value, torch.dtype)), dtype)
    return _wide(input) if dtype is None else input.to(dtype), int(input.ndim not in (0, 1, 3)) if dim is None else dim


def _wide(x: Tensor) -> Tensor:
    """`x`, in float32 where autocast would compute a norm or a softmax so."""
    reduced = x.dtype in (torch.float16, torch.bfloat16) and not x.is_meta
    return x.float() if reduced and torch.is_autocast_enabled(x.device.type) else x


def _of_instance_norm(m: Any, x: Tensor) -> Written | None:
    if m.track_running_stats or x.ndim == m._get_no_batch_dim():
        return None
    return Written(_instance_norm, (x, None, None, m.weight, m.bias, True, 0.0, m.eps), {})


_NAMES: dict[Any, tuple[str, ...]] = {}
"""Names of the inner values, by formula and the kinds of its arguments."""
_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((F.group_norm, torch.group_norm), _group_norm),
    F.instance_norm: _instance_norm,
    **dict.fromkeys((F.rms_norm, torch.rms_norm), _rms_norm),
    **dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax), _softmax),
    **dict.fromkeys((F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.special.log_softmax), _log_softmax),
    safe_softmax: _safe_softmax,
}
_MODULES: dict[type[nn.Module], Callable[[Any, Tensor], Written | None]] = {
    nn.LayerNorm: lambda m, x: Written(_layer_norm, (x, m.normalized_shape, m.weight, m.bias, m.eps), {}),
    nn.GroupNorm: lambda m, x: Written(_group_norm, (x, m.num_groups, m.weight, m.bias, m.eps), {}),
    nn.RMSNorm: lambda m, x: Written(_rms_norm, (x, m.normalized_shape, m.weight, m.eps), {}),
    nn.modules.instancenorm._InstanceNorm: _of_instance_norm,
    nn.Softmax: lambda m, x: Written(_softmax, (x, m.dim), {}),
    nn.Softmax2d: lambda m, x: Written(_softmax, (x, -3), {}),
    nn.LogSoftmax: lambda m, x: Written(_log_softmax, (x, m.dim), {}),
}
