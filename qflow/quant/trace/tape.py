"""The tape: a record of the torch operators in one forward pass on an example, with the user's names.

The call of a module is named by the module's path, its second call is `conv(1)`. A functional is `scope[add]`, its
second call `scope[add](1)`. An input is `quant[x]`, after the argument of `forward`. A constant that an operator reads
is `const[pos_embed]`, after its parameter or buffer, or else `const[scope[add]]`, after its first reader.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from qflow.core.graph import OpKind


@dataclass(frozen=True)
class Weight:
    """The weight of a functional (`F.conv2d(x, self.w)`): the name of its quantizer, and its slot in the call."""

    name: str
    slot: int
    axis: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ref:
    """A result of an op: the index of the op, and the position among its results."""

    op: int
    position: int


@dataclass(frozen=True)
class Call:
    """All that is needed to replay an op: a torch function or the path of a leaf module, and arguments with `Ref`s.

    Integers and tensors that are not the result of an op are kept as they were, so the call holds for this batch size.
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

    `inputs` are indices of producing ops on the tape, in argument order, constants included. `slots` holds for each
    its place among the tensors of the call, so that a forward pass can quantize that argument.
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
    """False if the call returns several tensors."""
    weight: Weight | None = None
    attrs: dict[str, int] = field(default_factory=dict)
    operands: tuple[float | None, ...] = ()
    statistics: str | None = None
    """Of `F.batch_norm`: path of the module whose running statistics, gain, bias and eps it applies."""
    inner: tuple[str, ...] = ()
    """Names of the values inside a norm or softmax that the device rounds (compounds.py)."""
    call: Call | None = None
    """Only a capture keeps it."""
    complex: bool = False
    """True if its (first) result is complex: such a result is not `floating`, and it is no jump (order.py)."""

    @property
    def owner(self) -> str | None:
        """Path of the module whose parameters the op applies: its own, or that of the statistics."""
        return self.module or self.statistics


@dataclass
class Tape:
    """All operator calls in order, the named model outputs, and how often each leaf module was called.

    `calls` leaves out modules that were not called and would only have passed values on (TRANSPARENT_KINDS).
    """

    ops: list[Op]
    outputs: list[tuple[str, int]]
    calls: dict[str, int]
    notes: list[str]
    names: frozenset[str]
    """Names of all calls, including those that do not depend on the inputs."""
    sites: dict[tuple[str, str, int, int], str]
    """Functional, function and line in the user's code, index at this site -> name of the call (sites.py)."""
    decomposed: frozenset[str]
    """Functions that were decomposed (decompose.py): the float graph equals the model to rounding, not bit for bit."""
    read_by_python: frozenset[int]
    """Ops from whose result a Python value was taken."""
    fingerprints: dict[str, tuple[str, tuple[float, ...]]]
    """Constant, or output without a producer -> its reader, and sums of its values; inputs must not change them."""
    state: list[int] = field(default_factory=list)
    """Ops whose result is kept as temporal state (state.py), returned or not."""
    results: dict[str, Tensor] = field(default_factory=dict)
    """Copies of the outputs that depend on the inputs, in a trace that keeps them."""


_PLAIN = (int, float, bool, str, type(None))


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors of nested arguments, in order."""
    return _parts(structure, Tensor)


def references(structure: Any) -> list[Ref]:
    """The `Ref`s of nested arguments, in order."""
    return _parts(structure, Ref)


def _parts(structure: Any, wanted: type) -> list[Any]:
    """All parts of one type, as from torch's tree_flatten, but cheaper for the usual arguments."""
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
    """Integers of a functional for the cost model: the inner dimension of a matmul, the weight sizes of F.conv2d."""
    if kind in (OpKind.resize, OpKind.grid_sample):
        return {"bicubic": 1} if "bicubic" in (*[a for a in args if isinstance(a, str)], kwargs.get("mode")) else {}
    if kind == OpKind.matmul and args and isinstance(args[0], str):
        return {"inner": _contracted(args[0], sources)}
    if kind == OpKind.matmul and len(sources) > 1:
        dims = kwargs.get("dims", args[2] if len(args) > 2 else 1)  # of tensordot: a number, or a list for each side
        summed = range(-dims, 0) if isinstance(dims, int) else dims[0] if isinstance(dims, (list, tuple)) else (-1,)
        return {"inner": math.prod(sources[0].shape[d] for d in summed)}
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
    """Number of products that are summed for each output element of an einsum."""
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
    """Channels, groups, kernel and weight elements of a weighted operator, from the shape of its weight."""
    out_channels, in_channels = (shape[1] * groups, shape[0]) if transposed else (shape[0], shape[1] * groups)
    kernel = 1
    for size in shape[2:]:
        kernel *= size
    total = kernel * shape[0] * shape[1]
    return {"in": in_channels, "out": out_channels, "groups": groups, "kernel": kernel, "weights": total}


def module_attrs(module: nn.Module, sources: Sequence[Tensor]) -> dict[str, int]:
    """Integers of a leaf module for the cost model; empty for most modules without weights."""
    if isinstance(module, nn.modules.conv._ConvNd):
        attrs = weight_attrs(tuple(module.weight.shape), module.groups, module.transposed)
        if module.transposed:  # each input position is multiplied with the whole kernel
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
        values.append(None)  # one operand too many marks a result that is not the plain function
    return tuple(float(v) if isinstance(v, (int, float)) and not isinstance(v, bool) else None for v in values)
