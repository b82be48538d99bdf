"""Known ranges: interval arithmetic over the graph, which derives the ranges of operators from ranges of its inputs.

In the guide's fixed-scale example with inputs a, b (range known) and c (unknown), every operator but quantstub_c and
the last add gets a fixed scale. An interval [low, high] contains all values that the operator can return. It is exact
for monotone functions, and may be too wide if one tensor is read twice (x - x).

    moves, pools, resize, mean, amax, amin      the hull of the inputs, and 0 if the operator pads with zeros
    add sub mul div neg abs maximum minimum     corners of the intervals; unknown for a divisor that contains 0
    relu relu6 clamp sigmoid tanh exp sqrt ...  the function at both ends
    softmax, sigmoid, tanh, sin, cos, ReLU6     the function's own bounds, for unknown inputs too

Unknown: matmul and convolution, norms, bicubic resize (attrs bicubic = 1: it overshoots), sums, scatter-like writes.
Ignored: `divisor_override` of a pool, rounding of a division, and the growth of values by dropout while training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qflow.core.graph import ModelGraph, OpKind, OpNode

Bounds = tuple[float, float]


@dataclass(frozen=True)
class KnownRange:
    """A range low..high of all values. `origins` names the given ranges that it follows from; it is empty for the
    function's own bounds.
    """

    low: float
    high: float
    origins: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.low:.6g}..{self.high:.6g}"


def propagate(graph: ModelGraph, given: Mapping[str, Bounds]) -> dict[str, Bounds]:
    """Return (low, high) of the `given` operators and of all whose range follows from at least one of them."""
    return {name: (r.low, r.high) for name, r in follow(graph, given).items() if r.origins}


def bounded(graph: ModelGraph) -> dict[str, Bounds]:
    """Return (low, high) of operators whose function is bounded (sigmoid 0..1, ReLU6 0..6)."""
    return {name: (r.low, r.high) for name, r in follow(graph, {}).items()}


def follow(graph: ModelGraph, given: Mapping[str, Bounds]) -> dict[str, KnownRange]:
    """Return every known range with its origins. `given` is by operator, and holds for all calls of a shared module."""
    owners = {node.quantizer: node.name for node in graph.quantized}
    known: dict[str, KnownRange] = {}
    for node in graph.nodes:
        stated = next((n for n in (node.name, owners.get(node.quantizer)) if n in given), None)
        if stated is not None:
            known[node.name] = KnownRange(*given[stated], (stated,))
            continue
        inputs = [known.get(name) for name in node.inputs]
        found = _interval(node, inputs)
        if found is not None and all(map(math.isfinite, found)):
            origins = dict.fromkeys(origin for r in inputs if r is not None for origin in r.origins)
            known[node.name] = KnownRange(*found, tuple(origins))
    return known


def shared_ranges(graph: ModelGraph, known: Mapping[str, KnownRange]) -> dict[str, KnownRange]:
    """Return for each owner of a quantizer the hull over all calls that share it, if all their ranges are known."""
    calls: dict[str, list[KnownRange | None]] = {}
    owners = {node.quantizer: node.name for node in graph.quantized}
    for node in graph.nodes:
        if node.quantizer is not None:
            calls.setdefault(owners[node.quantizer], []).append(known.get(node.name))
    found = {}
    for name, ranges in calls.items():
        sure = [r for r in ranges if r is not None]
        if len(sure) == len(ranges):
            origins = tuple(dict.fromkeys(origin for r in sure for origin in r.origins))
            found[name] = KnownRange(min(r.low for r in sure), max(r.high for r in sure), origins)
    return found


def function_of(node: OpNode) -> str:
    """Return the function's name in lower case, `relu6` for `torch.nn.modules.activation.ReLU6` and `torch.relu6`."""
    return node.op_type.rsplit(".", 1)[-1].lower()


def _interval(node: OpNode, ranges: Sequence[KnownRange | None]) -> Bounds | None:
    """Return the interval of `node` from those of its inputs; None if it is unknown."""
    name = function_of(node)
    inputs = [(r.low, r.high) if r is not None else None for r in ranges]
    if node.fused_types:
        return (0.0, 6.0) if node.fused_types[-1] == "ReLU6" else None
    if name in _KEEP:
        return _hull(inputs[:1])
    if name in _KEEP_OR_ZERO:
        kept = _hull(inputs[:1])
        return kept and (min(kept[0], 0.0), max(kept[1], 0.0)) if not node.attrs.get("bicubic") else None
    if name in _UNARY and len(inputs) == 1:
        return _UNARY[name](inputs[0]) if inputs[0] else _BOUNDED.get(name)
    if name in _BOUNDED:
        return _BOUNDED[name]
    if name in ("clamp", "clip", "clamp_min", "clamp_max", "hardtanh"):
        return _clamp(node, name, inputs)
    if name in _BINARY or name in ("pow", "rdiv", "rsub"):
        return _binary(node, name, inputs)
    if name in ("where", "masked_fill"):
        return _chosen(node, name, inputs)
    if name in _HULL and (name != "setitem" or len(inputs) == 2):
        return _hull(inputs)
    if node.kind == OpKind.move and name not in _NEW_VALUES:
        return _hull(inputs)
    return None


def _hull(inputs: Sequence[Bounds | None]) -> Bounds | None:
    sure = [r for r in inputs if r is not None]
    if not sure or len(sure) != len(inputs):
        return None
    return min(low for low, _ in sure), max(high for _, high in sure)


def _chosen(node: OpNode, name: str, inputs: Sequence[Bounds | None]) -> Bounds | None:
    """Return the interval of where(mask, a, b) or masked_fill(a, mask, b), with a and b tensors or numbers."""
    operands = node.operands or (None,) * (len(inputs) + 1)
    if len(operands) != 3:
        return None
    numbers = [o for i, o in enumerate(operands) if o is not None and i != (name == "masked_fill")]
    return _hull([*inputs, *((n, n) for n in numbers)]) if len(inputs) + len(numbers) == 2 else None


def _clamp(node: OpNode, name: str, inputs: Sequence[Bounds | None]) -> Bounds | None:
    """Return the interval of a clamp. With tensors as bounds (more than one input) it is unknown."""
    if len(inputs) != 1 or len(node.operands) < 2:
        return None
    _, first, *rest = node.operands
    low, high = (None, first) if name == "clamp_max" else (first, rest[0] if rest else None)
    if name == "hardtanh":
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    at = inputs[0] or (-math.inf, math.inf)
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    return min(max(at[0], low), high), min(max(at[1], low), high)


def _binary(node: OpNode, name: str, inputs: Sequence[Bounds | None]) -> Bounds | None:
    """Return the interval of a function of two arguments, each a tensor or a number.

    It is unknown with a third argument (alpha), or with a tensor that the graph does not hold (integers).
    """
    if name in ("max", "min") and len(inputs) == 1:  # over a dim: the result is one of the values
        return inputs[0]
    operands = node.operands or (None,) * len(inputs)
    if len(operands) != 2 or sum(o is None for o in operands) != len(inputs):
        return None
    queue = iter(inputs)
    a, b = (next(queue) if o is None else (o, o) for o in operands)
    if name == "pow":
        return _power(a, operands[1])
    if a is None or b is None:
        return None
    if name in ("rdiv", "rsub"):
        name, a, b = name[1:], b, a
    return _BINARY[name](a, b)


def _corners(function: Callable[[float, float], float]) -> Callable[[Bounds, Bounds], Bounds]:
    def interval(a: Bounds, b: Bounds) -> Bounds:
        values = [function(x, y) for x in a for y in b]
        return min(values), max(values)

    return interval


def _divide(a: Bounds, b: Bounds) -> Bounds | None:
    return None if b[0] <= 0.0 <= b[1] else _corners(lambda x, y: x / y)(a, b)


def _power(a: Bounds | None, exponent: float | None) -> Bounds | None:
    if a is None or exponent is None:
        return None
    whole = exponent == int(exponent)
    if (exponent < 0 and a[0] <= 0.0 <= a[1]) or (not whole and a[0] < 0.0):
        return None
    try:
        ends = [float(x**exponent) for x in a]
    except OverflowError:
        return None
    inside = [0.0] if a[0] < 0.0 < a[1] and whole and int(exponent) % 2 == 0 and exponent > 0 else []
    return min(ends + inside), max(ends + inside)


def _rising(
    function: Callable[[float], float], domain: float = -math.inf, at_domain: bool = True
) -> Callable[[Bounds], Bounds | None]:
    """Return the interval of a rising function that is defined from `domain` on (or above, if not `at_domain`)."""

    def interval(a: Bounds) -> Bounds | None:
        if a[0] < domain or (a[0] == domain and not at_domain):
            return None
        try:
            return function(a[0]), function(a[1])
        except OverflowError:
            return None

    return interval


def _even(function: Callable[[float], float]) -> Callable[[Bounds], Bounds | None]:
    """Return the interval of |x| or x*x, which falls until x = 0 and then rises."""

    def interval(a: Bounds) -> Bounds:
        ends = [function(a[0]), function(a[1])]
        return (0.0 if a[0] <= 0.0 <= a[1] else min(ends)), max(ends)

    return interval


def _wave(function: Callable[[float], float], peak: float) -> Callable[[Bounds], Bounds | None]:
    """Return the interval of sin or cos, which is 1 at `peak` + 2 pi k and -1 half a period later."""

    def hits(a: Bounds, place: float) -> bool:
        return math.floor((a[1] - place) / math.tau) >= math.ceil((a[0] - place) / math.tau)

    def interval(a: Bounds) -> Bounds:
        ends = (function(a[0]), function(a[1]))
        return -1.0 if hits(a, peak + math.pi) else min(ends), 1.0 if hits(a, peak) else max(ends)

    return interval


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


_UNARY: dict[str, Callable[[Bounds], Bounds | None]] = {
    "relu": _rising(lambda x: max(x, 0.0)),
    "relu6": _rising(lambda x: min(max(x, 0.0), 6.0)),
    "sigmoid": _rising(_sigmoid),
    "tanh": _rising(math.tanh),
    "hardsigmoid": _rising(lambda x: min(max(x / 6.0 + 0.5, 0.0), 1.0)),
    "exp": _rising(math.exp),
    "erf": _rising(math.erf),
    "log": _rising(lambda x: math.log(x), 0.0, at_domain=False),
    "sqrt": _rising(math.sqrt, 0.0),
    "rsqrt": lambda a: (a[1] ** -0.5, a[0] ** -0.5) if a[0] > 0.0 else None,
    "reciprocal": lambda a: _divide((1.0, 1.0), a),
    "neg": lambda a: (-a[1], -a[0]),
    "negative": lambda a: (-a[1], -a[0]),
    "abs": _even(abs),
    "absolute": _even(abs),
    "square": _even(lambda x: x * x),
    "sin": _wave(math.sin, math.pi / 2),
    "cos": _wave(math.cos, 0.0),
}
_BOUNDED: dict[str, Bounds] = {
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "softmax": (0.0, 1.0),
    "softmax2d": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "erf": (-1.0, 1.0),
    "relu6": (0.0, 6.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
}
_BINARY: dict[str, Callable[[Bounds, Bounds], Bounds | None]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _corners(lambda x, y: x * y),
    "div": _divide,
    "maximum": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "minimum": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
}
_BINARY |= {"max": _BINARY["maximum"], "min": _BINARY["minimum"]}
# The result consists of values of one tensor, or of their means.
_KEEP = frozenset({"mean", "amax", "amin", "topk", "sort", "gather", "index_select", "take_along_dim"}) | {
    f"{pool}{n}d" for pool in ("adaptiveavgpool", "adaptive_avg_pool", "maxpool", "max_pool") for n in (1, 2, 3)
}
_KEEP |= {f"{pool}{n}d" for pool in ("adaptivemaxpool", "adaptive_max_pool") for n in (1, 2, 3)}
# As above, but zeros may be added at the border; interpolation weights are positive and sum to 1, except bicubic.
_KEEP_OR_ZERO = frozenset(
    ["interpolate", "upsample", "upsamplingnearest2d", "upsamplingbilinear2d", "grid_sample", "unfold"]
    + ["zeropad2d", *(f"{pool}{n}d" for pool in ("avgpool", "avg_pool") for n in (1, 2, 3))]
)
_HULL = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "setitem"})
# Moves that add values which the graph does not hold.
_NEW_VALUES = frozenset({"pad", "constantpad2d", "setitem", "alphadropout", "alpha_dropout", "feature_alpha_dropout"})
