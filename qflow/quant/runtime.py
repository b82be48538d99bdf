"""How a prepared model runs: leaf modules of swapped class, functionals under a mode, one run at a time.

The user's Python code runs as it is. A leaf module (`Leaf` mixed into its own class) and the mode ask the
current `Run` for the operator's name (its call count decides) and pass the result through that operator's
quantizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from qflow.quant.decompose import decomposition
from qflow.quant.leaf import Leaf
from qflow.quant.ops import function_name, is_operator
from qflow.quant.run import Run, current_run
from qflow.quant.weighted import ConvLeaf, ConvTransposeLeaf, LinearLeaf, NormLeaf


class Mode(TorchFunctionMode):
    """Sees functionals in the user's code; inside a leaf module it only passes calls on."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = self.run
        if run.depth:
            return func(*args, **kwargs)
        parts = decomposition(func, args, kwargs)
        if parts is not None:
            with self:
                return parts(*args, **kwargs)
        name = _NAMES.get(func)
        if name is None:
            name = _NAMES[func] = function_name(func)
        base = f"{run.scopes[-1]}[{name}]"
        count = run.counts[base]
        call = base if count == 0 else f"{base}({count})"
        if call in run.arguments:
            args, kwargs = run.quantize_arguments(call, args, kwargs)
        out = func(*args, **kwargs)
        if not is_operator(out):
            return out
        run.counts[base] = count + 1
        return run.finish(call, out, args[0] if args else None)


_NAMES: dict[Any, str] = {}


def leaf_class(module: nn.Module) -> type[nn.Module]:
    """The module's class with the right `Leaf` mixed in; made once a class and kept here, so that it pickles."""
    own = type(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        mixin: type = ConvTransposeLeaf
    elif isinstance(module, nn.modules.conv._ConvNd):
        mixin = ConvLeaf
    elif isinstance(module, nn.Linear):
        mixin = LinearLeaf
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        mixin = NormLeaf
    else:
        mixin = Leaf
    name = f"Q_{own.__module__}_{own.__qualname__}".replace(".", "_")
    while name in globals() and globals()[name].__mro__[2] is not own:
        name += "_"  # another class of the same name, as notebooks make them
    if name not in globals():
        globals()[name] = type(name, (mixin, own), {"__module__": __name__, "__qualname__": name})
    made: type[nn.Module] = globals()[name]
    return made


@dataclass(frozen=True)
class EnterScope:
    """Forward pre-hook of a container: functionals called next belong to `path`."""

    path: str

    def __call__(self, module: nn.Module, args: Any) -> None:
        run = current_run()
        if run is not None:
            run.scopes.append(self.path)


def leave_scope(module: nn.Module, args: Any, out: Any) -> None:
    """Forward hook of a container, called even when its forward raised."""
    run = current_run()
    if run is not None and len(run.scopes) > 1:
        run.scopes.pop()


def enter_skipped(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a module that stays float: nothing inside it is seen."""
    run = current_run()
    if run is not None:
        run.depth += 1


@dataclass(frozen=True)
class LeaveSkipped:
    """Its forward hook: what comes back is quantized again where quantized operators read it."""

    path: str

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        run = current_run()
        if run is None or run.depth == 0:
            return out
        run.depth -= 1
        return out if run.depth or out is None else run.finish(run.name(self.path), out, None)
