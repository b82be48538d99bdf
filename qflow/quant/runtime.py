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
        out = func(*args, **(kwargs or {}))
        run = self.run
        if run.depth:
            return out
        name = _NAMES.get(func)
        if name is None:
            name = _NAMES[func] = function_name(func)
        if not is_operator(out):
            return out
        first = args[0] if args else None
        return run.finish(run.name(f"{run.scopes[-1]}[{name}]"), out, first)


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
