"""The tape: an example-driven record of the torch-level operators of one forward pass, with the user's names.

Names: a module call is its path, `conv(1)` the second call; a functional is `scope[add]`, its second call
`scope[add](1)`; an input is `quant[x]` after the argument of `forward`; a constant that an operator reads is
`const[pos_embed]` after its parameter or buffer, else `const[scope[add]]` after its first reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qflow.core.graph import OpKind


@dataclass(frozen=True)
class Weight:
    """The weight of a functional (`F.conv2d(x, self.w)`): a quantizer's name, and where the call takes it from."""

    name: str
    slot: int
    axis: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ref:
    """A tensor that an op gave: the op's index, and which of its tensors."""

    op: int
    position: int


@dataclass(frozen=True)
class Call:
    """What is needed to run an op again: a torch function or a leaf module's path, its arguments with `Ref`s.

    Integers and tensors that are not the result of an op are kept as they were: the call is one at this batch size.
    """

    function: Any
    module: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool
    """The result is written into the first argument."""


@dataclass
class Op:
    """One recorded operator call.

    `inputs` are indices of producing ops on the tape, in argument order, constants included; `slots` says for each
    which of the call's tensors it is, so that the runtime can reach that argument.
    """

    index: int
    name: str
    kind: OpKind
    op_type: str
    module: str | None
    scope: str
    inputs: tuple[int, ...]
    slots: tuple[int, ...]
    shape: tuple[int, ...]
    floating: bool
    single: bool = True
    """False where the call gives several tensors."""
    weight: Weight | None = None
    attrs: dict[str, int] = field(default_factory=dict)
    operands: tuple[float | None, ...] = ()
    call: Call | None = None
    """Kept by a capture only."""
    complex: bool = False
    """Its (first) result is a complex number: not floating, and not a jump either."""


@dataclass
class Tape:
    """All operator calls in order, the named model outputs, and how often each leaf module was called."""

    ops: list[Op]
    outputs: list[tuple[str, int]]
    calls: dict[str, int]
    notes: list[str]
    names: frozenset[str]
    """Names of all calls, those that do not depend on the inputs included."""
    sites: dict[tuple[str, str, int, int], str]
    """Functional, function and line in the user's code, index at this site -> name of the call (sites.py)."""
    decomposed: frozenset[str]
    """Functions that were written out in parts: the float graph equals the model to rounding, not bit for bit."""
    fingerprints: dict[str, tuple[str, tuple[float, ...]]]
    """Constant or loose output -> its reader and a few sums of its values: they may not depend on the inputs."""


_PLAIN = (int, float, bool, str, type(None))


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors of nested arguments, in order."""
    return _parts(structure, Tensor)


def references(structure: Any) -> list[Ref]:
    """The `Ref`s of nested arguments, in order."""
    return _parts(structure, Ref)


def _parts(structure: Any, wanted: type) -> list[Any]:
    """Those of one type: torch's own walk, without its cost for what nearly all calls hold."""
    if isinstance(structure, wanted):
        return [structure]
    kind = type(structure)
    if kind in _PLAIN:
        return []
    if kind is tuple or kind is list:
        return [found for part in structure for found in _parts(part, wanted)]
    if kind is dict:
        return [found for part in structure.values() for found in _parts(part, wanted)]
    if kind is Ref or isinstance(structure, Tensor):
        return []
    return [leaf for leaf in tree_flatten(structure)[0] if isinstance(leaf, wanted)]


def function_attrs(kind: OpKind, sources: Sequence[Tensor], args: Any, kwargs: Any) -> dict[str, int]:
    """Integers that a cost model needs from a functional: the inner dimension of a matmul, weights of F.conv2d."""
    if kind in (OpKind.resize, OpKind.grid_sample):
        return {"bicubic": 1} if "bicubic" in (*[a for a in args if isinstance(a, str)], kwargs.get("mode")) else {}
    if kind == OpKind.matmul and args and isinstance(args[0], str):
        return {"inner": _contracted(args[0], sources)}
    if kind == OpKind.matmul and len(sources) > 1:
        return {"inner": int(sources[0].shape[-1])}
    if kind in (OpKind.conv, OpKind.linear, OpKind.conv_transpose) and len(sources) > 1:
        transposed = kind == OpKind.conv_transpose
        position = 7 if transposed else 6
        groups = int(kwargs.get("groups", args[position] if len(args) > position else 1))
        attrs = weight_attrs(tuple(sources[1].shape), groups, transposed)
        if transposed:
            attrs["positions"] = sources[0].numel() // attrs["in"]
        return attrs
    return {}


def _contracted(equation: str, sources: Sequence[Tensor]) -> int:
    """Number of products summed for each output element of an einsum."""
    left, _, right = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, tensor in zip(left.split(","), sources, strict=False):
        sizes.update(zip(term, tensor.shape, strict=False))
    inner = 1
    for letter, size in sizes.items():
        if letter.isalpha() and letter not in right:
            inner *= int(size)
    return inner


def weight_attrs(shape: tuple[int, ...], groups: int, transposed: bool) -> dict[str, int]:
    """Channels, groups, kernel and weight elements of a weighted operator from its weight shape."""
    out_channels, in_channels = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    kernel = 1
    for size in shape[2:]:
        kernel *= size
    total = kernel * shape[0] * shape[1]
    return {"in": in_channels, "out": out_channels, "groups": groups, "kernel": kernel, "weights": total}


def module_attrs(module: nn.Module, sources: Sequence[Tensor]) -> dict[str, int]:
    """Cost attributes of a leaf module; empty for one without weights."""
    if isinstance(module, nn.modules.conv._ConvNd):
        attrs = weight_attrs(tuple(module.weight.shape), module.groups, module.transposed)
        if module.transposed:  # each input position meets the whole kernel
            attrs["positions"] = sources[0].numel() // module.in_channels
        return attrs
    if isinstance(module, nn.Upsample) and module.mode == "bicubic":
        return {"bicubic": 1}
    if isinstance(module, nn.Linear):
        return weight_attrs(tuple(module.weight.shape), 1, transposed=False)
    return {}


def operands(kind: OpKind, name: str, args: Any, kwargs: Any) -> tuple[float | None, ...]:
    """Positional arguments of an element-wise functional: the number, or None for a tensor (or an open bound)."""
    if kind not in (OpKind.add, OpKind.mul, OpKind.arithmetic, OpKind.lut, OpKind.relu):
        return ()
    values = list(args) or [kwargs[key] for key in ("input",) if key in kwargs]
    if name in ("clamp", "clip", "hardtanh", "threshold"):
        low, high = kwargs.get("min", kwargs.get("min_val")), kwargs.get("max", kwargs.get("max_val"))
        values = [*values, *[None] * (3 - len(values))][:3]
        values = [values[0], values[1] if low is None else low, values[2] if high is None else high]
    elif len(values) < 2 and "other" in kwargs:
        values.append(kwargs["other"])
    if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode"):
        values.append(None)  # one operand more than the function has: its result is not the plain one
    return tuple(float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else None for v in values)
