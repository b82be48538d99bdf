"""How a prepared model runs: the class of its leaf modules is swapped, and a TorchFunctionMode sees functionals.

The user's Python code runs unchanged. A leaf module (`Leaf` mixed into its own class) and the mode get the name of the
operator from the current `Run` (from the call count of a module, the call site of a functional) and pass the result
through the quantizer of that operator. A functional that was not traced stays float and is reported as unseen.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qflow.core.graph import TRANSPARENT_KINDS
from qflow.quant.model.leaf import Leaf, ReluLeaf, leaf_type
from qflow.quant.model.run import Run, current_run
from qflow.quant.model.weighted import ConvLeaf, ConvTransposeLeaf, LinearLeaf, NormLeaf
from qflow.quant.trace.decompose import decomposition
from qflow.quant.trace.ops import CONSTANTS, FILLS, FUNCTION_KINDS, function_name, is_operator
from qflow.quant.trace.order import ORDER_CHANGING
from qflow.quant.trace.sites import user_line
from qflow.quant.trace.tape import tensors_in


class Mode(TorchFunctionMode):
    """Handles functionals in the user's code; inside a leaf module it only passes calls on."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = self.run
        if run.depth:
            return func(*args, **kwargs)
        name = _NAMES.get(func)
        if name is None:
            name = _NAMES[func] = function_name(func)
        needed = None if run.order is not None and name in ORDER_CHANGING else run.needed
        if needed is not None and run.scopes[-1] not in needed:
            return func(*args, **kwargs)  # undivided: no quantizer acts on a part of it
        parts = decomposition(func, args, kwargs)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        base = f"{run.scopes[-1]}[{name}]"
        if needed is not None and base not in needed[run.scopes[-1]]:
            return func(*args, **kwargs)
        key, call = (base, "") if run.sited and base not in run.plan.bases else run.locate(base)
        if call in run.arguments:
            args, kwargs = run.quantize_arguments(call, args, kwargs)
        first: Any = kwargs["out"] if "out" in kwargs else args[0] if args else None
        if torch.is_grad_enabled() and writes_first(func, args, kwargs) and run.quantizes(call):
            # As in Leaf: backward needs the operator's own result, and the user's tensor gets the quantized one.
            run.advance(key, base, call)
            return first.copy_(run.finish(call, func(first.clone(), *args[1:], **kwargs), None))
        norm = run.plan.functional_norms.get(call)
        if norm in run.folded:  # the weight before it has it already
            run.folded.discard(norm)
            out = args[0] if args else kwargs["input"]
        else:
            out = run.inside(call, func, func, args, kwargs)
        if run.order is not None:
            out = run.order(name, call or base, out, args, kwargs)
        if not is_operator(out):
            return out
        run.advance(key, base, call)
        if not call:
            run.stay_float(f"{base}{user_line()}", out, quantizable(name, args, kwargs, out))
            return out
        return run.finish(call, out, first)


_NAMES: dict[Any, str] = {}
_WRITES: dict[Any, bool | int] = {}


def quantizable(name: str, args: Any, kwargs: Any, out: Any) -> bool:
    """True if this operator would have a quantizer had it been traced: it computes floats from tensors."""
    if name in CONSTANTS or name in FILLS or FUNCTION_KINDS.get(name) in TRANSPARENT_KINDS:
        return False
    return bool(tensors_in((args, kwargs))) and any(t.is_floating_point() for t in tensors_in(out))


_IN_PLACE = frozenset(
    f"__i{n}__"
    for n in ("add", "sub", "mul", "div", "truediv", "floordiv", "pow", "mod", "and", "or", "xor", "lshift", "rshift")
)


def in_place_form(func: Any) -> bool | int:
    """True for `relu_` and `__iadd__`; for `F.relu(x, inplace)` the position of `inplace`; else False."""
    name = str(getattr(func, "__name__", ""))
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE:
        return True
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # a builtin: none has an `inplace` argument
        return False
    return names.index("inplace") if "inplace" in names else False


def writes_first(func: Any, args: Any, kwargs: Any) -> bool:
    """True if this call writes its result into its first argument."""
    form = _WRITES.get(func)
    if form is None:
        form = _WRITES[func] = in_place_form(func)
    if form is True or form is False:
        return form and len(args) > 0
    return bool(kwargs.get("inplace", len(args) > form and args[form]))


def leaf_class(module: nn.Module) -> type[nn.Module]:
    """The module's class with the right `Leaf` mixed in."""
    own = type(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        mixin: type = ConvTransposeLeaf
    elif isinstance(module, nn.modules.conv._ConvNd):
        mixin = ConvLeaf
    elif isinstance(module, nn.Linear):
        mixin = LinearLeaf
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        mixin = NormLeaf
    elif isinstance(module, (nn.ReLU, nn.ReLU6)):
        mixin = ReluLeaf
    else:
        mixin = Leaf
    return leaf_type(mixin, own)


@dataclass(frozen=True)
class EnterScope:
    """Forward pre-hook of a container: functionals that are called from here on belong to `path`."""

    path: str

    def __call__(self, module: nn.Module, args: Any) -> None:
        run = current_run()
        if run is not None:
            run.scopes.append(self.path)


def leave_scope(module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook of a container; it also runs if the forward raised."""
    run = current_run()
    if run is not None and len(run.scopes) > 1:
        run.scopes.pop()


def enter_skipped(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a module that stays float: operators inside it are ignored."""
    run = current_run()
    if run is not None:
        run.depth += 1


@dataclass(frozen=True)
class LeaveSkipped:
    """Forward hook of a module that stays float: its result is quantized if quantized operators read it."""

    path: str

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        run = current_run()
        if run is None or run.depth == 0:
            return out
        run.depth -= 1
        return out if run.depth or out is None else run.finish(run.leaf_call(self.path), out, None)
