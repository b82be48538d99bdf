"""A traced and fused model as data: operators with the user's names, shapes, and who feeds whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property


class OpKind(str, Enum):
    """What an operator is to the device; the values are used in device rule files."""

    input = "input"  # the QuantStub that qflow sees at every float input
    constant = "constant"  # a parameter, buffer or fresh tensor that an operator reads beside its inputs
    skipped = "skipped"  # a module that the user keeps out of quantization: runs in float on the host
    conv = "conv"
    conv_transpose = "conv_transpose"
    linear = "linear"
    matmul = "matmul"
    norm = "norm"  # batch norm that could not be fused
    layer_norm = "layer_norm"
    relu = "relu"  # clamps: free behind a GEMM, cheap elsewhere
    lut = "lut"  # SiLU, GELU, sigmoid, tanh, ...: a table look-up on the vector engine
    softmax = "softmax"
    add = "add"
    mul = "mul"
    arithmetic = "arithmetic"  # sub, div, pow, ...
    concat = "concat"
    resize = "resize"
    max_pool = "max_pool"
    avg_pool = "avg_pool"
    grid_sample = "grid_sample"
    reduce = "reduce"
    move = "move"  # reshape, permute, slice, split: values are kept, so is the scale
    order = "order"  # topk, sort, argmax
    other = "other"

    def __str__(self) -> str:
        return self.value


GEMM_KINDS = frozenset({OpKind.conv, OpKind.conv_transpose, OpKind.linear, OpKind.matmul})
# What the plugin's template takes for a high-precision output (3.0.17: neither Conv1d nor transposed).
HIGH_PRECISION_KINDS = frozenset({OpKind.conv, OpKind.linear, OpKind.matmul})
WEIGHTED_KINDS = frozenset({OpKind.conv, OpKind.conv_transpose, OpKind.linear})
# Values pass unchanged, or are chosen among the inputs: no quantizer of their own, the producer's scale holds.
TRANSPARENT_KINDS = frozenset({OpKind.move, OpKind.max_pool, OpKind.order})


@dataclass(frozen=True)
class OpNode:
    """One operator call of the fused graph.

    `name` is the user's module path (`head.conv`), `head.conv(1)` for its second call, or `head[add]` for a
    functional; a fused group goes by its first module, or by its add where one was fused. `inputs` are names
    of producing operators; a constant is a producer too (`const[pos_embed]`). `shape` is that of the (first)
    output, batch first. `attrs` holds the integers a cost model needs (channels, kernel elements,
    groups, weight elements, ...).
    """

    name: str
    kind: OpKind
    op_type: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    quantizer: str | None = None
    """Name of the output quantizer; calls of a shared module share one. None for transparent operators."""
    weight: str | None = None
    """Name of the weight quantizer (the module path), or None."""
    fused: tuple[str, ...] = ()
    """Operators absorbed into this one, in order of execution."""
    fused_types: tuple[str, ...] = ()
    """What follows the head in the group: BN, Add, ReLU, ReLU6 (as in the plugin's class names)."""
    attrs: Mapping[str, int] = field(default_factory=dict)
    operands: tuple[float | None, ...] = ()
    """Arguments of an element-wise functional in order: a number where it was one, None for a tensor."""

    @property
    def fused_add(self) -> bool:
        """True where an add is part of the group: both its inputs are int8 only on nash-e/m."""
        return "Add" in self.fused_types

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call; 0 for what is no GEMM or has no known weights."""
        if self.kind == OpKind.matmul:
            return self.elements * self.attrs.get("inner", 0)
        if self.kind not in GEMM_KINDS or "weights" not in self.attrs:
            return 0
        return self.positions * self.attrs["weights"]

    @property
    def positions(self) -> int:
        """How often the whole weight is applied: output positions, or input positions of a transposed conv."""
        if "positions" in self.attrs:
            return self.attrs["positions"]
        return self.elements // self.attrs["out"] if self.attrs.get("out") else 0

    @property
    def elements(self) -> int:
        """Number of elements of the output."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class ModelGraph:
    """Operators in order of execution; `outputs` pairs the name of each model output with its producer."""

    nodes: tuple[OpNode, ...]
    outputs: tuple[tuple[str, str], ...]
    calls: Mapping[str, int] = field(default_factory=dict)
    """How often each leaf module was called; 0 for a module that was never reached."""
    unfused: tuple[tuple[str, str, str], ...] = ()
    """Fusable pairs that were not fused: first operator, second operator, why."""
    notes: tuple[str, ...] = ()
    """What tracing noticed: data-dependent sites, constants, operators left in float."""

    @cached_property
    def by_name(self) -> dict[str, OpNode]:
        """Operators by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """Names of the operators that read each operator's output."""
        found: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                found[source].append(node.name)
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def quantized(self) -> tuple[OpNode, ...]:
        """Operators that own an output quantizer, in order of execution; calls that share one give one row."""
        return self._owners("quantizer")

    @cached_property
    def weighted(self) -> tuple[OpNode, ...]:
        """Operators that own a weight quantizer, likewise."""
        return self._owners("weight")

    def _owners(self, what: str) -> tuple[OpNode, ...]:
        first: dict[str, OpNode] = {}
        for node in self.nodes:
            if getattr(node, what) is not None:
                first.setdefault(getattr(node, what), node)
        return tuple(first.values())

    def sources(self, name: str) -> tuple[str, ...]:
        """Nearest operators upstream of `name` that own a quantizer, looked up through transparent ones."""
        found: list[str] = []
        for source in self.by_name[name].inputs:
            node = self.by_name[source]
            found.extend([source] if node.quantizer is not None else self.sources(source))
        return tuple(dict.fromkeys(found))

    def source(self, producer: str) -> tuple[str, ...]:
        """`producer` itself if it owns a quantizer, else its own sources."""
        return (producer,) if self.by_name[producer].quantizer is not None else self.sources(producer)

    @cached_property
    def high_precision(self) -> tuple[str, ...]:
        """GEMMs whose result leaves the model and goes nowhere else: their output needs no quantizer.

        On J6E/M such a GEMM hands out its int32 accumulator (guide: high-precision output).
        """
        outputs = {producer for _, producer in self.outputs}

        def leaves(name: str) -> bool:
            readers = self.consumers[name]
            if not readers:
                return name in outputs
            through = all(self.by_name[r].op_type.endswith(("Identity", "Dropout", "Dropout2d")) for r in readers)
            return name not in outputs and through and all(leaves(r) for r in readers)

        return tuple(
            node.name
            for node in self.nodes
            if node.kind in HIGH_PRECISION_KINDS
            and not node.op_type.endswith("Conv1d")
            # a shared module owns one quantizer: all its calls must leave the model
            and all(leaves(other.name) for other in self.nodes if other.quantizer == node.quantizer)
        )
